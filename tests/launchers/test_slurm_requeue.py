"""Giving a job back to the queue: what others have done already is not done twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from launchers.lifecycle import cancellation
from launchers.lifecycle.exit_class import ExitClass, Verdict
from launchers.lifecycle.journal import read_journal
from launchers.lifecycle.policy import Decision
from launchers.lifecycle.supervise import Outcome
from launchers.run_dir import RunDir
from launchers.slurm import job
from launchers.slurm.commands import JobInfo, Slurm, SlurmError
from launchers.slurm.job import JobCancelledError, _requeue
from launchers.slurm.start import Allocation
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config


class Controller:
    """Answers as slurmctld 22.05 does to a job in ``state``."""

    def __init__(self, state: str, refusal: str | None, **more: Any) -> None:
        self.state, self.refusal, self.more = state, refusal, more
        self.requeued = 0
        self.excluded: list[str] = []

    def job(self, job: int) -> JobInfo:
        return JobInfo(job=job, state=self.state, reason="", **self.more)

    def requeue(self, job: int) -> None:
        if self.refusal:
            raise SlurmError(f"`scontrol requeue {job}` ended with code 1: {self.refusal}")
        self.requeued += 1

    def update_excluded(self, job: int, exclude: Any) -> None:
        self.excluded = sorted(exclude)


@pytest.mark.parametrize(
    ("state", "refusal", "requeued"),
    [
        ("RUNNING", None, 1),
        ("PENDING", "never asked", 0),
        # An administrator's requeue shows as completing while the job's processes are still being ended.
        ("COMPLETING", "Job is pending execution for job 2", 0),
    ],
)
def test_a_job_comes_back_once(state: str, refusal: str | None, requeued: int) -> None:
    controller = Controller(state, refusal)
    _requeue(cast(Slurm, controller), 2, ["node2"], ["node9"])
    assert controller.requeued == requeued
    assert controller.excluded == ["node2", "node9"]


def test_another_refusal_is_told() -> None:
    with pytest.raises(SlurmError, match="disabled"):
        _requeue(cast(Slurm, Controller("RUNNING", "Requeue is disabled")), 2, [], [])


def test_a_job_that_its_user_cancelled_stays_so() -> None:
    controller = Controller("COMPLETING", None, end_time=2000.0, restarts=1)
    with pytest.raises(JobCancelledError):
        _requeue(cast(Slurm, controller), 2, [], [], life=1)
    assert controller.requeued == 0


@pytest.mark.parametrize(("action", "exit_class"), [("requeue", ExitClass.PREEMPTED), ("stop", ExitClass.PREEMPTED)])
def test_a_wish_to_cancel_that_came_while_the_ranks_saved_is_heard(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, action: Any, exit_class: ExitClass
) -> None:
    """Whatever was decided before."""

    class Supervised:
        lease = SimpleNamespace(release=lambda: None)
        config = SimpleNamespace(launcher=SlurmConfig())

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def supervise(self) -> Outcome:
            cancellation.request(run, now=False)
            return Outcome(85, Verdict(exit_class, "to leave"), Decision(action, False, (), "to leave"))

    cancelled: list[int] = []
    monkeypatch.setattr(job, "Supervisor", Supervised)
    monkeypatch.setattr(job, "SlurmBackend", lambda *_: None)
    monkeypatch.setattr(job, "tell_tracker", lambda *_, **__: True)
    monkeypatch.setattr(job, "_wait_for_the_end", lambda: None)
    slurm = SimpleNamespace(cancel=cancelled.append)  # anything else is not asked for
    allocation = SimpleNamespace(job=7, restarts=0, nodes=("n1",))
    config = cast(Config, Supervised.config)
    code = job._supervise(run, config, cast(Slurm, slurm), cast(Allocation, allocation), [])
    assert (code, cancelled) == (130, [7])
    assert [entry["event"] for entry in read_journal(run)] == ["cancelled"]
