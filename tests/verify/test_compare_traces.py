"""Comparison of traces, on traces made by hand: what diverged first, where, and how far apart two runs are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.verify.compare import (
    Tolerance,
    deviation,
    exact_divergence,
    scalar_divergence,
    state_divergence,
)
from pretrain.verify.traces import Moment, read_attempt, trace_file

TOLERANCE = Tolerance(1e-5, 1e-4)


def record(rank: int, step: int, **changes: Any) -> dict[str, Any]:
    """What rank ``rank`` of two would write: two of the step's four samples, half of each of two tensors."""
    made = {
        "event": "step",
        "step": step,
        "rank": rank,
        "leader": True,
        "sample_ids": [4 * step + rank, 4 * step + 2 + rank],
        "rng": f"{step:08x}{rank:08x}",
        "loss": 5.0 / step,
        "grad_norm": 1.0 / step,
        "scalars": {"step": float(step)},
        "state": {"master:a": f"{100 * step + rank:016x}", "exp_avg:b": f"{200 * step + rank:016x}"},
    }
    return made | changes


def moment(step: int, records: list[dict[str, Any]] | None = None) -> Moment:
    return Moment(step, tuple(records or [record(0, step), record(1, step)]))


@pytest.mark.parametrize(
    ("rank", "field", "value", "quantity"),
    [
        (1, "sample_ids", [12, 13], "sample ids"),
        (0, "rng", "ff", "random state"),
        (1, "loss", math.nextafter(5.0 / 3, 2), "loss"),
        (0, "grad_norm", -0.0, "gradient norm"),
        (1, "scalars", {"step": 2.0}, "optimizer scalars"),
    ],
)
def test_the_first_divergence_has_a_name_and_a_rank(rank: int, field: str, value: Any, quantity: str) -> None:
    records = [record(0, 3), record(1, 3)]
    records[rank][field] = value
    # The state follows from all of these: it differs too, and is not the cause.
    records[0]["state"]["master:a"] = f"{1:016x}"
    fault = exact_divergence(moment(3), moment(3, records))
    assert fault is not None
    assert (fault.step, fault.quantity, fault.where) == (3, quantity, f"rank {rank}")
    assert (fault.expected, fault.found) == (repr(record(rank, 3)[field]), repr(value))
    assert repr(value) in str(fault)


def test_a_tensor_is_named_with_its_rank_and_the_number_of_others() -> None:
    records = [record(0, 3), record(1, 3)]
    records[1]["state"]["exp_avg:b"] = f"{7:016x}"
    fault = exact_divergence(moment(3), moment(3, records))
    assert fault is not None
    assert (fault.quantity, fault.where, fault.others) == ("exp_avg:b", "rank 1", 0)
    assert fault.expected == f"{601:016x}"
    records[1]["state"]["master:a"] = f"{7:016x}"
    del records[0]["state"]["exp_avg:b"]
    fault = exact_divergence(moment(3), moment(3, records))
    assert fault is not None
    assert (fault.quantity, fault.where, fault.found, fault.others) == ("exp_avg:b", "rank 0", "absent", 1)


def test_equal_moments_have_no_divergence() -> None:
    assert exact_divergence(moment(3), moment(3)) is None
    assert state_divergence(moment(3), moment(3)) is None
    assert scalar_divergence(moment(3), moment(3)) is None


def test_state_is_compared_as_a_sum_over_any_ranks() -> None:
    top = (1 << 64) - 5
    shares = [{"master:a": f"{top:016x}", "exp_avg:b": f"{3:016x}"}, {"master:a": f"{9:016x}"}]
    split = moment(3, [record(0, 3, state=shares[0]), record(1, 3, state=shares[1])])
    single = moment(3, [record(0, 3, state={"master:a": f"{4:016x}", "exp_avg:b": f"{3:016x}"})])
    assert state_divergence(single, split) is None
    other = moment(3, [record(0, 3, state={"master:a": f"{4:016x}", "exp_avg:b": f"{2:016x}"})])
    fault = state_divergence(single, other)
    assert fault is not None
    assert (fault.quantity, fault.expected, fault.found) == ("exp_avg:b", f"{3:016x}", f"{2:016x}")
    assert state_divergence(single, other, ["master"]) is None


def test_scalars_of_every_rank_count() -> None:
    records = [record(0, 3), record(1, 3, scalars={"step": 0.0})]
    fault = scalar_divergence(moment(3, [record(0, 3)]), moment(3, records))
    assert fault is not None
    assert fault.where == "rank 1"


def test_the_global_batch_counts_each_data_parallel_index_once() -> None:
    twins = [record(0, 3), record(0, 3, leader=False), record(1, 3)]
    assert moment(3, twins).sample_ids == [12, 13, 14, 15]


def trajectory(steps: int, changes: dict[int, dict[str, Any]] | None = None) -> dict[int, Moment]:
    changed = changes or {}
    return {s: moment(s, [record(rank, s, **changed.get(s, {})) for rank in (0, 1)]) for s in range(1, steps + 1)}


def test_deviations_are_the_largest_ones_with_their_steps() -> None:
    found = trajectory(4, {2: {"loss": 2.5 + 3e-6}, 3: {"loss": 5 / 3 - 2e-6, "grad_norm": 1 / 3 * (1 + 5e-5)}})
    gap = deviation(trajectory(4), found, range(1, 5), TOLERANCE)
    assert gap.divergence is None
    assert (gap.loss, gap.loss_step) == (pytest.approx(3e-6, rel=1e-6), 2)
    assert (gap.grad_norm, gap.grad_norm_step) == (pytest.approx(5e-5, rel=1e-6), 3)
    assert not gap.is_bitwise
    assert deviation(trajectory(4), trajectory(4), range(1, 5), TOLERANCE).is_bitwise


def test_equal_losses_on_other_weights_are_not_bitwise() -> None:
    found = trajectory(2, {2: {"state": {"master:a": f"{1:016x}"}}})
    gap = deviation(trajectory(2), found, range(1, 3), TOLERANCE)
    assert (gap.loss, gap.state_bitwise_steps, gap.is_bitwise) == (0.0, 1, False)


@pytest.mark.parametrize(
    ("changes", "quantity"),
    [
        ({"loss": 5.0 / 3 + 2e-5}, "loss"),
        ({"loss": math.nan}, "loss"),
        ({"grad_norm": 1 / 3 * 1.001}, "gradient norm"),
        ({"sample_ids": [1, 2]}, "sample ids"),
    ],
)
def test_the_first_step_beyond_tolerance_is_named(changes: dict[str, Any], quantity: str) -> None:
    found = trajectory(5, {3: changes, 4: {"loss": 9.0}})
    gap = deviation(trajectory(5), found, range(1, 6), TOLERANCE)
    assert gap.divergence is not None
    assert (gap.divergence.step, gap.divergence.quantity) == (3, quantity)


def test_a_step_that_was_never_reached_is_a_divergence() -> None:
    gap = deviation(trajectory(4), trajectory(2), range(1, 5), TOLERANCE)
    assert gap.divergence is not None
    assert (gap.divergence.step, gap.divergence.found) == (3, "absent")
    assert not gap.is_bitwise


def write(folder: Path, rank: int, lines: list[dict[str, Any]], tail: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    trace_file(folder, rank).write_text(text + tail)


def started(rank: int, step: int = 3) -> dict[str, Any]:
    return {"event": "start", "step": step, "rank": rank, "scalars": {"step": 3.0}, "state": {}}


def test_reading_joins_ranks_and_leaves_out_what_a_kill_tore(tmp_path: Path) -> None:
    write(tmp_path, 0, [started(0), record(0, 4), record(0, 5), record(0, 6)])
    write(tmp_path, 1, [started(1), record(1, 4), record(1, 5)], tail='{"event": "step", "st')
    trace = read_attempt(tmp_path, 2)
    assert (trace.start.step, sorted(trace.steps)) == (3, [4, 5])
    assert trace.steps[5].records == (record(0, 5), record(1, 5))


def test_a_missing_or_foreign_trace_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 0, [started(0)])
    with pytest.raises(ValueError, match=r"rank_00001.jsonl: no such trace.*train.trace=true"):
        read_attempt(tmp_path, 2)
    trace_file(tmp_path, 1).write_text("no json\n")
    with pytest.raises(ValueError, match=r"rank_00001.jsonl: not a trace"):
        read_attempt(tmp_path, 2)
    trace_file(tmp_path, 1).write_text("")
    with pytest.raises(ValueError, match="rank 1 recorded no start"):
        read_attempt(tmp_path, 2)
