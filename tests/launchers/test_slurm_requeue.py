"""Giving a job back to the queue: what others have done already is not done twice."""

from __future__ import annotations

from typing import Any, cast

import pytest

from launchers.slurm.commands import JobInfo, Slurm, SlurmError
from launchers.slurm.job import _requeue


class Controller:
    """Answers as slurmctld 22.05 does to a job in ``state``."""

    def __init__(self, state: str, refusal: str | None) -> None:
        self.state, self.refusal = state, refusal
        self.requeued = 0
        self.excluded: list[str] = []

    def job(self, job: int) -> JobInfo:
        return JobInfo(job=job, state=self.state, reason="")

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
