"""The end of an attempt is in the record, whoever writes it."""

from __future__ import annotations

from launchers.outcome import record_end
from launchers.run_dir import RunDir
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
