"""Whoever ends a run's wait, or its hope of going on, tells the tracker: nothing else would ever do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.watched_run import WatchedRun

from launchers import outcome as outcome_module
from launchers.lifecycle.exit_class import ExitClass, Verdict
from launchers.lifecycle.journal import read_journal
from launchers.lifecycle.policy import Decision
from launchers.lifecycle.supervise import Outcome
from launchers.run_dir import RunDir
from launchers.slurm import commands, job
from launchers.slurm.commands import JobInfo, Slurm, SlurmError
from launchers.slurm.start import Allocation
from launchers.watch import jobs
from pretrain.cli import main
from pretrain.commands import cancel
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config
from pretrain.tracking.lifecycle import run_status


class FakeSlurm:
    """A controller that gives no job back to the queue; its own is as ``info`` has it."""

    def __init__(self, **info: Any) -> None:
        self.info = {"state": "RUNNING", "reason": "", **info}

    def job(self, number: int) -> JobInfo:
        return JobInfo(job=number, **self.info)

    def requeue(self, number: int) -> None:
        raise SlurmError("requeue: not allowed here")

    def cancel(self, number: int, **_: Any) -> None:
        pass


@pytest.fixture
def queued(tmp_path: Path) -> WatchedRun:
    run = WatchedRun(tmp_path / "runs" / "demo")
    run.submitted(7)
    return run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The statuses that the tracker was told, as it reads them from the records."""
    statuses: list[str | None] = []

    def tell(run: RunDir, timeout_s: float | None = None) -> bool:
        status = run_status(read_journal(run), None)
        statuses.append(status.name if status is not None else None)
        return True

    for module in (job, outcome_module):
        monkeypatch.setattr(module, "tell_tracker", tell)
    return statuses


def _back(run: WatchedRun, slurm: FakeSlurm, exit_class: ExitClass) -> int:
    run.started(1, 7)
    run.ended(1, exit_class.value, "requeue")
    config = SimpleNamespace(launcher=SlurmConfig(), cluster=ClusterConfig())
    allocation = SimpleNamespace(job=7, restarts=0, nodes=("node1",))
    outcome = Outcome(1, Verdict(exit_class, "words"), Decision("requeue", False, (), "words"))
    return job._back_to_queue(run.run, cast(Config, config), cast(Slurm, slurm), cast(Allocation, allocation), outcome)


@pytest.mark.parametrize(("exit_class", "status"), [(ExitClass.CRASH, "FAILED"), (ExitClass.PREEMPTED, "KILLED")])
def test_a_run_that_cannot_be_queued_again_does_not_look_as_if_it_waited(
    queued: WatchedRun,
    told: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    exit_class: ExitClass,
    status: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise SlurmError("Invalid account")

    monkeypatch.setattr(job, "submit", refuse)
    monkeypatch.setattr(job, "at_full_size", lambda _, config: config)
    assert _back(queued, FakeSlurm(), exit_class) == 1
    assert read_journal(queued.path)[-1]["event"] == "requeue_failed"
    assert told == ["SCHEDULED", status]


def test_a_job_cancelled_meanwhile_does_not_look_as_if_it_waited(queued: WatchedRun, told: list[str | None]) -> None:
    assert _back(queued, FakeSlurm(state="CANCELLED"), ExitClass.CRASH) == job._INTERRUPTED
    assert told == ["KILLED"]


def test_a_job_that_finds_its_cancellation_at_its_start_tells(
    queued: WatchedRun, told: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_wait_for_the_end", lambda: None)
    job._cancelled(queued.run, cast(Slurm, FakeSlurm()), 7)
    assert told == ["KILLED"]


def test_a_job_taken_out_of_the_queue_is_told(
    queued: WatchedRun, told: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "Slurm", FakeSlurm)
    monkeypatch.setattr(jobs, "ask_slurm", lambda _: SimpleNamespace(views={}))
    assert cancel._leave_queue(queued.run, "7")
    assert told == ["KILLED"]


def test_cancel_puts_right_what_scancel_alone_left_behind(
    queued: WatchedRun,
    told: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = SimpleNamespace(is_active=False, state="cancelled", job="7", note="job 7 was cancelled")
    monkeypatch.setattr("launchers.watch.summary.summarise_one", lambda _: (summary, None))
    for _ in range(2):
        assert main(["cancel", str(queued.path)]) == 0
        assert "nothing to cancel, it is cancelled" in capsys.readouterr().out
    assert told == ["KILLED"]  # once
    assert [entry["event"] for entry in read_journal(queued.path)] == ["submitted", "cancelled"]
