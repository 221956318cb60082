"""metrics.jsonl: whole lines, torn lines, odd numbers, fencing, and history across attempts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.tracking.metrics_log import MetricsLog, effective_records, read_records, series


@given(
    metrics=st.dictionaries(st.text(max_size=5), st.floats(), max_size=4),
    text=st.text(),
)
@settings(max_examples=50, deadline=None)
def test_records_read_back_with_every_bit(tmp_path_factory: pytest.TempPathFactory, metrics: dict, text: str) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with MetricsLog(path, 3) as log:
        log.write("train", 7, metrics=metrics, note=text)
    (record,) = read_records(path)
    assert (record["attempt"], record["event"], record["step"], record["note"]) == (3, "train", 7, text)
    assert record["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        got = record["metrics"][name]
        assert got == value or (math.isnan(got) and math.isnan(value))


def test_lines_are_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with MetricsLog(tmp_path / "m", 1) as log:
        log.write("train", 1, metrics={"loss": math.nan, "grad_norm": math.inf}, extra=[-math.inf])
    json.loads((tmp_path / "m").read_text(), parse_constant=refuse)


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsLog(path, 1) as log:
        for step in (1, 2, 3):
            log.write("train", step, metrics={"loss": 1.0})
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines()[0]) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        before = [record["step"] for record in read_records(path)]
        with MetricsLog(path, 2) as log:
            log.write("train", 9, metrics={"loss": 1.0})
        steps = [record["step"] for record in read_records(path)]
        assert steps == [*before, 9]
        assert before in ([1], [1, 2], [1, 2, 3])


def test_bytes_of_zero_after_a_power_loss_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"\0" * 100 + b"\n[1, 2]\nnull\n")
    with MetricsLog(path, 1) as log:
        log.write("phase", name="x")
    assert len(read_records(path)) == 1


def test_a_fenced_attempt_writes_nothing(tmp_path: Path) -> None:
    class FencedError(Exception):
        pass

    fenced = False

    def fence() -> None:
        if fenced:
            raise FencedError

    log = MetricsLog(tmp_path / "m", 1, fence)
    log.write("train", 1, metrics={"loss": 1.0})
    fenced = True
    with pytest.raises(FencedError):
        log.write("train", 2, metrics={"loss": 1.0})
    with pytest.raises(FencedError):
        MetricsLog(tmp_path / "m", 1, fence)
    assert [record["step"] for record in read_records(tmp_path / "m")] == [1]


def _record(attempt: int, event: str, step: int, value: float = 0.0) -> dict:
    return {"time": 0.0, "attempt": attempt, "event": event, "step": step, "metrics": {"loss": value}}


def test_rolled_back_steps_are_superseded_but_the_checkpointed_ones_stay() -> None:
    records = [
        _record(1, "start", 0),
        *(_record(1, "train", step, 1.0) for step in range(1, 8)),
        _record(1, "eval", 5, 1.0),
        _record(2, "start", 5),
        *(_record(2, "train", step, 2.0) for step in (6, 7, 8)),
        _record(3, "start", 7),
        _record(3, "train", 8, 3.0),
    ]
    effective = effective_records(records)
    assert series(effective, "train", "loss") == (list(range(1, 9)), [1.0] * 5 + [2.0] * 2 + [3.0])
    assert series(effective, "eval", "loss") == ([5], [1.0])


def test_without_a_start_record_the_first_step_decides() -> None:
    records = [_record(1, "train", step, 1.0) for step in (1, 2, 3, 4)] + [_record(2, "train", 3, 2.0)]
    assert series(effective_records(records), "train", "loss") == ([1, 2, 3], [1.0, 1.0, 2.0])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=5))
def test_effective_steps_are_those_of_a_run_never_interrupted(attempts: list[tuple[int, int]]) -> None:
    records, reached, truth = [], 0, {}
    for number, (rollback, done) in enumerate(attempts, start=1):
        start = max(0, reached - rollback)
        truth = {step: value for step, value in truth.items() if step <= start}
        records.append(_record(number, "start", start))
        for step in range(start + 1, start + done + 1):
            records.append(_record(number, "train", step, float(number)))
            truth[step] = float(number)
        reached = start + done
    steps, values = series(effective_records(records), "train", "loss")
    assert dict(zip(steps, values, strict=True)) == truth
    assert steps == sorted(set(steps))
