"""What MLflow is told of a run's life, from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.tracking.lifecycle import is_settled, lifecycle_tags, lifecycle_values, run_status

Record = dict[str, Any]


def _submitted(kind: str = "first", job: str = "7") -> Record:
    return {"time": 1.0, "event": "submitted", "job": job, "kind": kind, "script": "s", "exclude": []}


def _started(attempt: int = 1, job: str | None = "7") -> Record:
    return {
        "time": 2.0 + attempt,
        "event": "attempt_started",
        "attempt": attempt,
        "launcher": "slurm",
        "job": job,
        "nodes": ["n1", "n2"],
        "num_processes": 4,
    }


def _ended(exit_class: str, action: str, attempt: int = 1, **fields: Any) -> Record:
    return {
        "time": 10.0 * attempt,
        "event": "attempt_ended",
        "attempt": attempt,
        "exit_class": exit_class,
        "action": action,
        "reason": "why",
        "last_step": 12,
        "saved_step": 9,
        **fields,
    }


def _end(status: str, attempt: int = 1) -> Record:
    return {"time": 9.0, "event": "end", "attempt": attempt, "status": status}


_REQUEUED = {"time": 30.0, "event": "requeued", "job": "7", "exclude": []}
_NO_REQUEUE = {"time": 35.0, "event": "requeue_failed", "job": "7", "message": "Invalid account"}
_GAVE_UP = {"time": 36.0, "event": "gave_up", "job": "7", "message": "disk full"}
_CANCELLED = {"time": 40.0, "event": "cancelled", "job": "7"}


@pytest.mark.parametrize(
    ("journal", "boundary", "expected"),
    [
        ([], None, None),
        ([], {"time": 1.0, "event": "start", "attempt": 1}, "RUNNING"),
        ([], _end("finished"), "FINISHED"),
        ([], _end("interrupted"), "KILLED"),
        ([], _end("failed"), "FAILED"),
        ([_submitted()], None, "SCHEDULED"),
        ([_submitted(), _started()], None, "RUNNING"),
        ([_submitted(), _started(), _submitted("chain", "8")], None, "RUNNING"),
        ([_submitted(), _started(), _submitted("resume", "8")], None, "SCHEDULED"),
        ([_started()], _end("finished"), "FINISHED"),
        ([_started()], _end("interrupted"), None),
        ([_started()], _end("failed"), None),
        ([_started(), _ended("crash", "restart"), _started(2)], _end("failed"), "RUNNING"),
        ([_started(), _ended("finished", "stop")], _end("finished"), "FINISHED"),
        ([_started(), _ended("preempted", "requeue")], _end("interrupted"), "SCHEDULED"),
        ([_started(), _ended("node_failure", "exclude")], None, "SCHEDULED"),
        ([_started(), _ended("crash", "restart")], _end("failed"), "RUNNING"),
        ([_started(), _ended("time_limit", "requeue"), _REQUEUED], _end("interrupted"), "SCHEDULED"),
        ([_started(), _ended("interrupted", "stop")], _end("interrupted"), "KILLED"),
        ([_started(), _ended("preempted", "stop")], _end("interrupted"), "KILLED"),
        ([_started(), _ended("host_memory", "stop")], None, "FAILED"),
        ([_submitted(), _CANCELLED], None, "KILLED"),
        ([_started(), _ended("crash", "requeue"), _REQUEUED, _NO_REQUEUE], None, "FAILED"),
        ([_started(), _ended("hang", "exclude"), _NO_REQUEUE], _end("failed"), "FAILED"),
        ([_started(), _ended("preempted", "requeue"), _NO_REQUEUE], _end("interrupted"), "KILLED"),
        ([_started(), _ended("time_limit", "requeue"), _NO_REQUEUE, _submitted("resume")], None, "SCHEDULED"),
        ([_started(), _GAVE_UP], {"time": 1.0, "event": "start", "attempt": 1}, "FAILED"),
        ([_started(), _GAVE_UP], _end("finished"), "FINISHED"),
        ([_started(), _ended("finished", "stop"), _GAVE_UP], _end("finished"), "FINISHED"),
        ([_started(), _ended("time_limit", "requeue"), _REQUEUED, _GAVE_UP], _end("interrupted"), "FAILED"),
        ([_started(), {"time": 5.0, "event": "cancel_requested", "now": False}], None, "RUNNING"),
    ],
)
def test_the_status_is_true_at_every_point_of_a_life(
    journal: list[Record], boundary: Record | None, expected: str | None
) -> None:
    status = run_status(journal, boundary)
    assert (status.name if status else None) == expected


def test_tags_tell_jobs_restarts_and_the_last_end() -> None:
    journal = [_submitted(), _started(), _ended("hang", "requeue", reason="rank 3 stood still"), _REQUEUED]
    journal += [_submitted("chain", "9"), _started(2, "9")]
    tags = lifecycle_tags(journal, None)
    assert tags["restarts"] == "1"
    assert tags["attempt"] == "2"
    assert tags["nodes"] == "n1,n2"
    assert (tags["slurm.job"], tags["slurm.jobs"]) == ("9", "7,9")
    assert (tags["exit_class"], tags["exit_reason"], tags["exit_attempt"]) == ("hang", "rank 3 stood still", "1")
    assert lifecycle_tags(journal, _end("finished", 2))["exit_class"] == "finished"
    assert lifecycle_tags([], None) == {}


def test_tags_tell_why_a_run_that_was_to_go_on_does_not() -> None:
    tags = lifecycle_tags([_started(), _ended("crash", "requeue"), _REQUEUED, _NO_REQUEUE], None)
    assert (tags["exit_action"], tags["exit_reason"]) == ("stop", "why; Invalid account")


def test_values_tell_restarts_and_steps_lost_and_are_the_same_from_any_point_on() -> None:
    journal = [_started(), _ended("killed", "restart"), _started(2), _ended("finished", "stop", 2, saved_step=12)]
    values = lifecycle_values(journal)
    assert [(v.name, v.value, v.step) for v in values] == [
        ("lifecycle/restarts", 0.0, 0),
        ("lifecycle/attempt_s", 7.0, 9),
        ("lifecycle/steps_lost", 3.0, 9),
        ("lifecycle/restarts", 1.0, 9),
        ("lifecycle/attempt_s", 16.0, 12),
        ("lifecycle/steps_lost", 0.0, 12),
    ]
    assert lifecycle_values(journal, 2) == values[3:]


def test_only_the_end_that_a_rank_told_itself_need_not_be_told_again() -> None:
    journal = [_started(), _ended("finished", "stop")]
    assert is_settled(journal, 1, finished_attempt=1)
    assert not is_settled(journal, 1, finished_attempt=None)
    assert not is_settled([_started(), _ended("crash", "stop")], 1, finished_attempt=1)
    assert is_settled(journal, 2, finished_attempt=None)
    # Cancellations carry nothing but a status; a run that stays behind has its reason to tell.
    assert is_settled([*journal, _CANCELLED], 2, finished_attempt=None)
    assert not is_settled([*journal, _NO_REQUEUE], 2, finished_attempt=None)
