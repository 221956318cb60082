"""The end of an attempt is in the record, whoever writes it."""

from __future__ import annotations

import pytest

from launchers.outcome import record_end, record_failure
from launchers.run_dir import RunDir
from pretrain.tracking import metrics_log
from pretrain.tracking.metrics_log import MetricsLog, read_records


def test_an_end_that_ranks_could_not_write_is_added_once(run: RunDir) -> None:
    with MetricsLog(run.metrics_path, 1) as log:
        log.write("start", 0, steps=10)
        log.write("train", 4, metrics={"loss": 1.0})
    assert record_end(run, 1, 137)
    assert not record_end(run, 1, 137)
    last = read_records(run.metrics_path)[-1]
    assert (last["event"], last["status"], last["step"], last["message"]) == ("end", "failed", 4, "killed by SIGKILL")


def test_a_failure_before_the_first_record_is_recorded(run: RunDir) -> None:
    assert record_end(run, 2, 2)
    (only,) = read_records(run.metrics_path)
    assert (only["status"], only["attempt"]) == ("failed", 2)
    assert "step" not in only


def test_the_ranks_own_end_stands(run: RunDir) -> None:
    with MetricsLog(run.metrics_path, 1) as log:
        log.write("end", 4, status="interrupted", message="SIGTERM")
    assert not record_end(run, 1, 85)


def test_the_end_of_a_long_record_is_all_that_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(run.metrics_path, 1) as log:
        for step in range(1000):
            log.write("train", step, metrics={"loss": 1.0})
    monkeypatch.setattr(metrics_log, "_RECENT_BYTES", 2000)
    read = [record["step"] for record in metrics_log.recent_records(run.metrics_path)]
    assert read == list(range(1000 - len(read), 1000))
    assert 5 < len(read) < 50
    assert record_end(run, 1, 137)
    assert not record_end(run, 1, 137)
    last = read_records(run.metrics_path)[-1]
    assert (last["event"], last["step"]) == ("end", 999)


def test_a_rank_without_a_log_has_failed_all_the_same(run: RunDir) -> None:
    record_failure(run, 1, 3, 137, run.rank_log_path(1, 3))
    (only,) = read_records(run.metrics_path)
    assert (only["rank"], only["message"]) == (3, "rank 3 ended with code 137 (killed by SIGKILL)")


def test_the_last_line_of_a_long_log_is_recorded(run: RunDir) -> None:
    log = run.rank_log_path(1, 0)
    log.parent.mkdir(parents=True)
    log.write_text("x" * 200_000 + "\nno luck\n")
    record_failure(run, 1, 0, 1, log)
    assert read_records(run.metrics_path)[-1]["message"].endswith(": no luck")
