"""The state of a run, out of all that bears on it. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launchers.lease import Holder, is_here, shows_life
from launchers.watch.attempts import GOES_ON, Attempt
from launchers.watch.files import Record
from launchers.watch.jobs import JobView
from launchers.watch.position import Position


class State(StrEnum):
    """Where a run stands."""

    CREATED = "created"  # frozen, never started
    PENDING = "pending"  # submitted, waits in Slurm's queue
    STARTING = "starting"  # an attempt is held, no step yet
    RUNNING = "running"
    REQUEUED = "requeued"  # waits in the queue for its next attempt
    FINISHED = "finished"
    STOPPED = "stopped"  # saved and left; the user may resume it
    CANCELLED = "cancelled"
    FAILED = "failed"  # ended by a fault, and the lifecycle does not go on
    LOST = "lost"  # nobody tells of an end, and nobody is at work


SETTLE_S = 30.0
"""For so long after an attempt nobody may hold the run and no queue have it yet, although it goes on."""

ACTIVE = frozenset({State.PENDING, State.STARTING, State.RUNNING, State.REQUEUED})
"""States from which a run goes on without anybody's doing."""

_NOT_COMING_BACK = frozenset({"CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY"})
"""Ends of a job that is not queued again by Slurm, nor was by its own supervisor: that one waits to be ended then."""

# Ends that leave a good checkpoint and no fault.
_ORDERLY = ("interrupted", "preempted", "time_limit")


_WAYS_OUT = (
    (
        "BadConstraints",
        ": no nodes fit what it asks for (`scontrol show job {job}`). If its ExcNodeList leaves too few, let them in "
        "again with `scontrol update JobId={job} ExcNodeList=`",
    ),
    ("ReqNodeNotAvail", ": nodes that it needs are down, drained or reserved (`sinfo -R` says why)"),
    ("PartitionDown", ": its partition takes no jobs now (`sinfo -s`); the site knows for how long"),
    ("JobHeldUser", ": let it go with `scontrol release {job}`"),
    ("JobHeldAdmin", ": the site holds it; ask there"),
    ("launch failed requeued held", ": see why nodes failed (`sinfo -R`), then `scontrol release {job}`"),
)
"""Slurm's reason for a job that waits (its beginning), and the way out."""


@dataclass(frozen=True)
class Facts:
    """All that bears on the state of a run."""

    journal: Sequence[Record]
    last: Attempt | None
    position: Position
    holder: Holder | None
    cancel: tuple[float, bool] | None
    job: str | None
    view: JobView | None
    asked: bool
    now: float

    def state(self) -> tuple[State, str | None]:
        if self.holder is not None and shows_life(self.holder) and not self._job_is_over(self.holder):
            return self._at_work()
        queued = self._last_of("submitted", "requeued")
        started = self._last_of("attempt_started")
        if queued > started:
            cancelled = self._last_of("cancelled")
            if cancelled > queued:
                return State.CANCELLED, "before it started"
            return self._queued(State.PENDING if self.last is None else State.REQUEUED)
        if (gave_up := self._last_of("gave_up", "requeue_failed")) > started >= 0:
            return State.FAILED, str(self.journal[gave_up].get("message"))
        if self.last is None:
            return self._without_journal()
        if self.last.exit_class is not None:
            return self._ended(self.last)
        return self._unfinished()

    def _last_of(self, *events: str) -> int:
        return max((index for index, entry in enumerate(self.journal) if entry["event"] in events), default=-1)

    def _job_is_over(self, holder: Holder) -> bool:
        """Slurm knows before a lease on another machine runs out that its holder's job is no more."""
        if not self.asked or self.last is None or self.last.job is None or self.last.job != self.job:
            return False
        return not is_here(holder) and (self.view is None or not self.view.is_active)

    def _at_work(self) -> tuple[State, str | None]:
        assert self.holder is not None
        last = self.last
        if last is not None and last.number == self.holder.attempt and last.exit_class is not None:
            # The supervisor is at work between two attempts, or about to leave.
            if last.action in GOES_ON:
                return State.STARTING, f"again after {last.exit_class}"
            return State.RUNNING, f"about to end: {last.exit_class}"
        trained = self.position.has_trained and self.position.attempt == self.holder.attempt
        return (State.RUNNING if trained else State.STARTING), None

    def _queued(self, state: State) -> tuple[State, str | None]:
        view = self.view
        if view is None:
            if self.asked:
                return State.LOST, f"Slurm does not know job {self.job} any more"
            return state, "Slurm was not asked"
        if view.waits:
            start = ""
            if view.start is not None and view.start > self.now:
                start = f"; expected start {time.strftime('%Y-%m-%d %H:%M', time.localtime(view.start))}"
            return state, f"{view.reason or view.state}{start}{self._way_out(view.reason)}"
        if view.is_active:
            return State.STARTING, f"job {self.job} is {view.state}"
        if view.state == "CANCELLED":
            return State.CANCELLED, f"job {self.job} was cancelled before an attempt began"
        return State.FAILED, f"job {self.job} ended ({view.state}) before the attempt began"

    def _way_out(self, reason: str | None) -> str:
        """What to do about a job that will not start by waiting alone."""
        return next((way.format(job=self.job) for word, way in _WAYS_OUT if (reason or "").startswith(word)), "")

    def _without_journal(self) -> tuple[State, str | None]:
        status = self.position.end_status
        if self.holder is None and status is None:
            return (State.LOST, "no sign of who runs it") if self.position.has_trained else (State.CREATED, None)
        if status == "finished":
            return State.FINISHED, None
        if status == "interrupted":
            return State.STOPPED, self.position.end_message
        if status is not None:
            return State.FAILED, self.position.end_message
        return State.LOST, "it ended without a record"

    def _ended(self, last: Attempt) -> tuple[State, str | None]:
        if last.exit_class == "finished":
            return State.FINISHED, None
        if last.action in GOES_ON and self._last_of("cancelled") > self._last_of("attempt_ended"):
            return State.CANCELLED, f"after {last.exit_class}"
        if last.action in GOES_ON:
            if self.view is not None and (self.view.waits or self.view.is_active):
                return self._queued(State.REQUEUED)
            if self.view is not None and last.job == self.job and self.view.state in _NOT_COMING_BACK:
                words = f"{last.exit_class}: {last.action} was decided, but job {self.job} ended ({self.view.state})"
                return (State.CANCELLED if self.view.state == "CANCELLED" else State.FAILED), words
            if last.ended is not None and 0 <= self.now - last.ended < SETTLE_S:
                return State.STARTING, f"again after {last.exit_class}"
            return State.LOST, f"{last.exit_class}: {last.action} was decided but did not happen"
        if last.exit_class in ("interrupted", "killed") and self._was_cancelled():
            return State.CANCELLED, last.reason
        return (State.STOPPED if last.exit_class in _ORDERLY else State.FAILED), last.reason

    def _was_cancelled(self) -> bool:
        """A cancellation came after the last attempt began, or after it was asked for."""
        begun = [
            index
            for index, entry in enumerate(self.journal)
            if entry["event"] == "submitted" or (entry["event"] == "attempt_ended" and entry.get("action") == "stop")
        ]
        # The end of the last attempt itself does not count.
        since = max((index for index in begun if index < self._last_of("attempt_started")), default=-1)
        return self._last_of("cancel_requested", "cancelled") > since

    def _unfinished(self) -> tuple[State, str | None]:
        assert self.last is not None
        if self.view is not None and self.view.waits:
            return self._queued(State.REQUEUED)
        if self._last_of("cancelled") > self._last_of("attempt_started"):
            return State.CANCELLED, "killed"
        if self.view is not None and self.view.state == "CANCELLED":
            return State.CANCELLED, f"job {self.job} was cancelled before it could tell of its end"
        age = self.now - self.holder.heartbeat if self.holder is not None else None
        silence = f"no sign of life for {roughly(age)}" if age is not None and age >= 0 else "no sign of life"
        if self.view is not None and self.view.is_active:
            if self.view.start is not None and self.holder is not None and self.view.start > self.holder.heartbeat:
                return State.STARTING, f"job {self.job} is {self.view.state}"
            return State.RUNNING, f"{silence}, but job {self.job} is {self.view.state}"
        if self.holder is not None and self.holder.released:
            return State.LOST, "its supervisor left without a record of the end"
        ended = f"; job {self.job} is {self.view.state}" if self.view is not None else ""
        return State.LOST, silence + ended


def roughly(seconds: float) -> str:
    """A duration in one unit."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
