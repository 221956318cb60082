"""What MLflow is told of a run's life: status, tags and metrics, from ``lifecycle.jsonl`` and ``metrics.jsonl``.

Pure functions of the records, so that whoever sends last tells the same. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pretrain.tracking.metrics_log import Record

TERMINAL = ("FINISHED", "FAILED", "KILLED")
# How rank 0's own last record translates where no supervisor keeps a journal.
_BY_END = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# Ends that came from outside and found the run sound: stopped, not failed.
_STOPPED = ("interrupted", "preempted", "time_limit")
# The run was to go on, and whoever was to see to it could not: it waits for its user.
_STRANDED = ("requeue_failed", "gave_up")
_STATES = ("submitted", "requeued", "attempt_started", "attempt_ended", "cancelled", *_STRANDED)


class Status(NamedTuple):
    """MLflow's word for the run's state, and since when (unix seconds)."""

    name: str
    since: float

    @property
    def is_terminal(self) -> bool:
        return self.name in TERMINAL


class Value(NamedTuple):
    """One metric value; ``time`` in unix seconds."""

    name: str
    value: float
    time: float
    step: int


def run_status(journal: Sequence[Record], boundary: Record | None) -> Status | None:
    """The run's status; None where nothing is known, or where the supervisor has yet to judge the end.

    ``journal`` holds the records of lifecycle.jsonl, ``boundary`` the last ``start`` or ``end`` of metrics.jsonl. A
    rank that stops or fails does not know what follows: with a journal only its ``finished`` counts.
    """
    last: Record | None = None
    for record in journal:
        if record["event"] not in _STATES:
            continue
        # A job queued ahead for the time after the running attempt does not make the run wait.
        running = last is not None and last["event"] == "attempt_started"
        ahead = running and record["event"] == "submitted" and record.get("kind") == "chain"
        over = last is not None and last["event"] == "attempt_ended" and last["action"] == "stop"
        if not ahead and not (over and record["event"] in _STRANDED):
            last = record
    if last is None:
        if boundary is None:
            return None
        name = "RUNNING" if boundary["event"] == "start" else _BY_END.get(boundary.get("status", ""), "FAILED")
        return Status(name, boundary["time"])
    event, when = last["event"], last["time"]
    if event == "cancelled":
        return Status("KILLED", when)
    if event in ("submitted", "requeued"):
        return Status("SCHEDULED", when)
    if event in _STRANDED:
        return _stranded(journal, boundary, last)
    if event == "attempt_started":
        if boundary is None or boundary["event"] == "start" or boundary.get("attempt", 0) < last["attempt"]:
            return Status("RUNNING", when)
        return Status("FINISHED", boundary["time"]) if boundary.get("status") == "finished" else None
    if last["exit_class"] == "finished":
        return Status("FINISHED", when)
    if last["action"] in ("requeue", "exclude"):
        return Status("SCHEDULED", when)
    if last["action"] == "restart":
        return Status("RUNNING", when)
    return Status("KILLED" if last["exit_class"] in _STOPPED else "FAILED", when)


def _stranded(journal: Sequence[Record], boundary: Record | None, last: Record) -> Status:
    lives = [record for record in journal if record["event"] in ("attempt_started", "attempt_ended")]
    life = lives[-1] if lives else None
    if life is not None and boundary is not None and _finished(boundary, life):
        return Status("FINISHED", boundary["time"])
    stopped = last["event"] == "requeue_failed" and life is not None and life.get("exit_class") in _STOPPED
    return Status("KILLED" if stopped else "FAILED", last["time"])


def lifecycle_tags(journal: Sequence[Record], boundary: Record | None) -> dict[str, str]:
    """Tags: attempts and restarts, how the last attempt ended, Slurm jobs and nodes."""
    started = [record for record in journal if record["event"] == "attempt_started"]
    ended = [record for record in journal if record["event"] == "attempt_ended"]
    # A job submitted and a job running may be the same one, or not (requeue by submission).
    jobs = list(dict.fromkeys(str(record["job"]) for record in journal if record.get("job") is not None))
    tags: dict[str, str] = {}
    if started:
        tags |= {"attempt": str(started[-1]["attempt"]), "restarts": str(len(started) - 1)}
        tags |= {"launcher": str(started[-1].get("launcher", "")), "nodes": ",".join(started[-1].get("nodes") or [])}
    if ended:
        end = ended[-1]
        tags |= {"exit_class": str(end["exit_class"]), "exit_action": str(end["action"])}
        tags |= {"exit_reason": str(end.get("reason", "")), "exit_attempt": str(end["attempt"])}
        after = [record for record in journal[journal.index(end) :] if record["event"] in _STATES]
        if after[-1]["event"] in _STRANDED and end["action"] != "stop":
            tags["exit_action"] = "stop"
            tags["exit_reason"] = "; ".join(filter(None, (tags["exit_reason"], str(after[-1].get("message", "")))))
    if started and boundary is not None and _finished(boundary, started[-1]):
        # What the supervisor is about to journal: a finished run need not be told of once more.
        tags |= {"exit_class": "finished", "exit_action": "stop", "exit_reason": "", "exit_attempt": tags["attempt"]}
    if jobs:
        tags |= {"slurm.job": jobs[-1], "slurm.jobs": ",".join(jobs)}
    return {name: value for name, value in tags.items() if value or name in ("exit_reason",)}


def _finished(boundary: Record, started: Record) -> bool:
    return (
        boundary["event"] == "end"
        and boundary.get("status") == "finished"
        and boundary.get("attempt", 0) >= started["attempt"]
    )


def lifecycle_values(journal: Sequence[Record], first: int = 0) -> list[Value]:
    """Metrics of the journal's records from number ``first`` on: restarts, and what each end has cost."""
    values: list[Value] = []
    restarts, step, began = -1, 0, 0.0
    for number, record in enumerate(journal):
        found: list[Value] = []
        when = record["time"]
        if record["event"] == "attempt_started":
            restarts, began = restarts + 1, when
            found.append(Value("lifecycle/restarts", float(restarts), when, step))
        elif record["event"] == "attempt_ended":
            last, saved = record.get("last_step"), record.get("saved_step")
            step = int(saved if saved is not None else last or step)
            if began:
                found.append(Value("lifecycle/attempt_s", when - began, when, step))
            if last is not None:
                found.append(Value("lifecycle/steps_lost", float(max(0, last - (saved or 0))), when, step))
        if number >= first:
            values += found
    return values


def is_settled(journal: Sequence[Record], known: int, finished_attempt: int | None) -> bool:
    """Whether records from number ``known`` on tell MLflow nothing but a status: a cancellation, or the end of an
    attempt that said so itself."""
    return all(
        record["event"] in ("cancel_requested", "cancelled") or _is_own_end(record, finished_attempt)
        for record in journal[known:]
    )


def _is_own_end(record: dict[str, Any], finished_attempt: int | None) -> bool:
    return (
        record["event"] == "attempt_ended"
        and record.get("exit_class") == "finished"
        and record.get("attempt") == finished_attempt
    )
