"""States and figures of runs, out of the records that launchers and ranks leave."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.watched_run import WatchedRun

from launchers.run_dir import RunDirectoryError
from launchers.watch.files import TAIL_BYTES
from launchers.watch.find import find_runs, resolve_run
from launchers.watch.jobs import Jobs, JobView, parse_squeue
from launchers.watch.state import State
from launchers.watch.summary import RunSummary, summarise


@pytest.fixture
def watched(tmp_path: Path) -> WatchedRun:
    return WatchedRun(tmp_path / "demo")


def slurm_says(job: int, state: str, **more: object) -> Jobs:
    return Jobs({str(job): JobView(state, **more)}, asked=True)  # type: ignore[arg-type]


def look(watched: WatchedRun, jobs: Jobs | None = None, *, later: float = 0.0) -> RunSummary:
    return summarise(watched.path, jobs, time.time() + later)


def test_a_frozen_run_that_never_started_is_created(watched: WatchedRun) -> None:
    summary = look(watched)
    assert (summary.state, summary.step, summary.steps, summary.restarts) == (State.CREATED, None, 100, 0)


def test_a_submitted_run_waits_says_why_and_starts(watched: WatchedRun) -> None:
    watched.submitted(7)
    assert look(watched).state == State.PENDING
    summary = look(watched, slurm_says(7, "PENDING", reason="Priority", start=time.time() + 3600))
    assert summary.state == State.PENDING
    assert summary.note is not None
    assert summary.note.startswith("Priority; expected start ")
    assert look(watched, slurm_says(7, "CONFIGURING")).state == State.STARTING
    assert look(watched, slurm_says(7, "CANCELLED")).state == State.CANCELLED
    assert look(watched, slurm_says(7, "FAILED")).state == State.FAILED
    # Slurm was asked and has never heard of it, or no longer.
    assert look(watched, Jobs(asked=True)).state == State.LOST
    assert look(watched, Jobs(fault="no answer")).state == State.PENDING


def test_a_job_that_fits_no_nodes_tells_the_way_out(watched: WatchedRun) -> None:
    watched.submitted(4)
    seen = look(watched, slurm_says(4, "PENDING", reason="BadConstraints"))
    assert seen.state is State.PENDING
    assert "scontrol update JobId=4 ExcNodeList=" in str(seen.note)
    assert look(watched, slurm_says(4, "PENDING", reason="Priority")).note == "Priority"


def test_a_running_attempt_tells_step_speed_and_time_to_go(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.held(1, here=False, age=5)
    assert look(watched).state == State.STARTING
    watched.trained(1, 0, 40, seconds=2.0)
    summary = look(watched)
    assert (summary.state, summary.step, summary.steps) == (State.RUNNING, 40, 100)
    assert summary.loss == pytest.approx(5.0 / 40)
    assert summary.tokens_per_s == pytest.approx(1000 + 30.5)  # median of the last 20 steps
    # Steps are 2 s apart although each takes 0.5 s: evaluations and checkpoints count.
    assert summary.pace_s == pytest.approx(2.0)
    assert summary.eta_s == pytest.approx(120.0)
    watched.beat(1, 0, step=43, phase="eval")
    summary = look(watched)
    assert (summary.step, summary.phase) == (43, "eval")


def test_a_run_that_lives_but_does_not_move_says_so(watched: WatchedRun) -> None:
    watched.started(1)
    watched.held(1)
    watched.trained(1, 0, 10, ago=600)
    # The journal's own entry is of this moment: look from later on.
    watched.beat(1, 0, phase="all-reduce", phase_since=time.time() - 590, time=time.time() + 600)
    summary = look(watched, later=600)
    assert (summary.state, summary.phase, summary.note) == (
        State.RUNNING,
        "all-reduce",
        "no new step or phase for 10 min",
    )
    assert summary.heard is not None
    assert summary.moved is not None
    assert summary.heard - summary.moved > 500
    watched.beat(1, 0, phase="save", phase_since=time.time() + 590)
    assert look(watched, later=600).note is None


def test_a_holder_on_another_machine_is_lost_when_it_falls_silent(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.trained(1, 0, 5)
    watched.held(1, here=False, age=600)
    summary = look(watched)
    assert summary.state == State.LOST
    assert summary.note is not None
    assert "no sign of life for 10 min" in summary.note
    # Slurm knows better.
    summary = look(watched, slurm_says(7, "RUNNING", start=time.time() - 9999))
    assert summary.state == State.RUNNING
    assert summary.note is not None
    assert "but job 7 is RUNNING" in summary.note
    assert look(watched, slurm_says(7, "PENDING", reason="BeginTime")).state == State.REQUEUED
    # Its batch host died, Slurm queued it again, and it has just started anew.
    assert look(watched, slurm_says(7, "RUNNING", start=time.time())).state == State.STARTING


def test_slurm_knows_that_a_job_is_over_before_the_lease_runs_out(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.trained(1, 0, 5)
    watched.held(1, here=False, age=1)
    assert look(watched, slurm_says(7, "RUNNING")).state == State.RUNNING
    assert look(watched, slurm_says(7, "NODE_FAIL")).state == State.LOST
    assert look(watched, slurm_says(7, "PENDING")).state == State.REQUEUED
    # The job that comes after this one waits already: this one is still at work.
    watched.submitted(8, "chain")
    assert look(watched, slurm_says(8, "PENDING")).state == State.RUNNING


def test_a_dead_holder_on_this_machine_is_lost_at_once(watched: WatchedRun) -> None:
    watched.started(1)
    watched.trained(1, 0, 5)
    watched.held(1)
    assert look(watched).state == State.RUNNING
    watched.held(1, pid=2**22 + 5)  # no process has it
    assert look(watched).state == State.LOST


@pytest.mark.parametrize(
    ("exit_class", "expected"),
    [
        ("finished", State.FINISHED),
        ("interrupted", State.STOPPED),
        ("time_limit", State.STOPPED),
        ("preempted", State.STOPPED),
        ("device_memory", State.FAILED),
        ("hang", State.FAILED),
        ("crash", State.FAILED),
        ("a_class_of_a_later_release", State.FAILED),
    ],
)
def test_the_last_end_gives_the_state(watched: WatchedRun, exit_class: str, expected: State) -> None:
    watched.started(1)
    watched.trained(1, 0, 10)
    watched.ended(1, exit_class)
    watched.held(1, released=True)
    summary = look(watched)
    assert (summary.state, summary.exit_class, summary.restarts) == (expected, exit_class, 0)
    assert summary.eta_s is None
    assert look(watched, later=1e6).state == expected


def test_a_cancelled_run_is_not_one_that_was_stopped(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.journal("cancel_requested", now=False, by="me")
    watched.ended(1, "interrupted")
    assert look(watched).state == State.CANCELLED
    # Its user continued it and stopped it by hand: the old cancellation is history.
    watched.submitted(8, "resume")
    watched.started(2, 8)
    watched.ended(2, "interrupted")
    assert look(watched).state == State.STOPPED


def test_scancel_is_a_cancellation_however_much_of_the_end_was_recorded(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.held(1, here=False, age=5)
    # The supervisor was killed before it could write anything.
    assert look(watched, slurm_says(7, "CANCELLED")).state == State.CANCELLED
    watched.journal("cancelled", job=7)
    assert look(watched, slurm_says(7, "CANCELLED")).state == State.CANCELLED
    watched.ended(1, "interrupted")
    assert look(watched, slurm_says(7, "CANCELLED")).state == State.CANCELLED


def test_a_job_cancelled_before_it_could_be_queued_again(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.ended(1, "preempted", "requeue")
    watched.journal("cancelled", job=7)
    assert look(watched, slurm_says(7, "CANCELLED"), later=600).state == State.CANCELLED


def test_a_cancelled_run_that_is_continued_on_a_workstation_forgets_it(watched: WatchedRun) -> None:
    watched.started(1)
    watched.journal("cancel_requested", now=False, by="me")
    watched.ended(1, "interrupted")
    watched.started(2)
    watched.ended(2, "interrupted")
    assert look(watched).state == State.STOPPED


def test_a_cancellation_in_the_queue_and_one_by_force(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.journal("cancel_requested", now=False, by="me")
    watched.journal("cancelled", job=7)
    assert look(watched, slurm_says(7, "CANCELLED")).state == State.CANCELLED
    assert look(watched).state == State.CANCELLED
    watched.submitted(8, "resume")
    watched.started(1, 8)
    watched.held(1, pid=2**22 + 5)
    watched.journal("cancel_requested", now=True, by="me")
    watched.journal("cancelled", job=8)
    assert look(watched).state == State.CANCELLED


def test_restarts_are_counted_and_a_requeue_waits(watched: WatchedRun) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.ended(1, "killed", "restart", last_step=10)
    watched.started(2, 7)
    watched.trained(2, 10, 20)
    watched.ended(2, "preempted", "requeue", first_step=10, last_step=20, saved_step=20)
    # Between its end and the queue: neither lost nor over.
    assert look(watched).state == State.STARTING
    assert look(watched, later=3600).state == State.LOST
    watched.journal("requeued", job=7, exclude=[])
    summary = look(watched, slurm_says(7, "PENDING", reason="BeginTime"))
    assert (summary.state, summary.note, summary.restarts) == (State.REQUEUED, "BeginTime", 2)
    assert (summary.exit_class, summary.step, len(summary.attempts)) == ("preempted", 20, 2)
    assert look(watched, Jobs(asked=True)).state == State.LOST


@pytest.mark.parametrize(("job_state", "expected"), [("FAILED", State.FAILED), ("CANCELLED", State.CANCELLED)])
def test_a_job_that_is_over_does_not_go_on(watched: WatchedRun, job_state: str, expected: State) -> None:
    watched.submitted(7)
    watched.started(1, 7)
    watched.ended(1, "killed", "restart", last_step=10)
    assert look(watched, slurm_says(7, "RUNNING")).state == State.STARTING
    summary = look(watched, slurm_says(7, job_state))
    assert (summary.state, summary.note) == (
        expected,
        f"killed: restart was decided, but job 7 ended ({job_state})",
    )


def test_an_attempt_that_failed_is_no_end_while_its_supervisor_goes_on(watched: WatchedRun) -> None:
    watched.started(1)
    watched.trained(1, 0, 10)
    watched.ended(1, "killed", "restart", last_step=10)
    watched.held(1)
    summary = look(watched)
    assert (summary.state, summary.note) == (State.STARTING, "again after killed")
    watched.started(2)
    watched.held(2)
    assert look(watched).state == State.STARTING
    watched.trained(2, 4, 6)
    summary = look(watched)
    assert (summary.state, summary.step, summary.attempt) == (State.RUNNING, 6, 2)


def test_a_rollback_gives_the_step_and_pace_of_the_way_taken(watched: WatchedRun) -> None:
    watched.started(1)
    watched.trained(1, 0, 50, seconds=100.0, ago=60)
    watched.trained(1, 20, 30, seconds=1.0)
    watched.held(1)
    summary = look(watched)
    assert summary.step == 30
    assert summary.pace_s == pytest.approx(1.0)
    assert summary.eta_s == pytest.approx(70.0)


def test_runs_without_a_journal_are_understood(watched: WatchedRun) -> None:
    from pretrain.tracking.metrics_log import MetricsLog

    watched.trained(1, 0, 10)
    watched.held(1, released=True)
    for status, expected in (
        ("failed", State.FAILED),
        ("interrupted", State.STOPPED),
        ("finished", State.FINISHED),
    ):
        with MetricsLog(watched.run.metrics_path, 1) as log:
            log.write("end", 10, status=status, message="words")
        summary = look(watched)
        assert (summary.state, summary.exit_class) == (expected, status)


def test_what_is_looked_for_is_found_behind_much_else(watched: WatchedRun) -> None:
    watched.started(1)
    watched.held(1)
    watched.trained(1, 0, 30)
    with open(watched.run.metrics_path, "a") as stream:
        for _ in range(TAIL_BYTES[0] // 1000 + 50):
            stream.write('{"event": "system", "attempt": 1, "text": "' + "x" * 1000 + '"}\n')
    summary = look(watched)
    assert (summary.state, summary.step) == (State.RUNNING, 30)


def test_a_run_is_found_by_path_name_and_unique_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alpha-1", "alpha-2", "beta-1"):
        WatchedRun(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    assert [path.name for path in find_runs(root)] == ["alpha-1", "alpha-2", "beta-1"]
    assert find_runs(root / "beta-1") == [root / "beta-1"]
    assert resolve_run("runs/alpha-1", "runs") == root / "alpha-1"
    assert resolve_run("alpha-2", "runs") == root / "alpha-2"
    assert resolve_run("b", "runs") == root / "beta-1"
    with pytest.raises(RunDirectoryError, match="2 runs in runs begin so: alpha-1, alpha-2"):
        resolve_run("alph", "runs")
    with pytest.raises(RunDirectoryError, match=r"gamma: neither .* runs there: alpha-1, alpha-2, beta-1"):
        resolve_run("gamma", "runs")
    with pytest.raises(RunDirectoryError, match="there are no runs"):
        resolve_run("gamma", "elsewhere")
    with pytest.raises(RunDirectoryError, match="no such folder"):
        find_runs(tmp_path / "elsewhere")


def test_squeue_lines_are_read_and_foreign_ones_passed_over() -> None:
    output = (
        "7|PENDING|1767225600|N/A||Priority\n"
        "slurm_load_jobs: warning\n"
        "8|RUNNING|2026-01-01T00:00:00|1767229200|node[1-2]|None\n"
        "9|PENDING|N/A|N/A|(null)|(launch failed requeued held)\n"
    )
    views = parse_squeue(output)
    assert set(views) == {"7", "8", "9"}
    assert views["7"] == JobView("PENDING", "Priority", 1767225600.0, None, None)
    assert views["8"].nodes == "node[1-2]"
    assert views["8"].start is not None
    assert views["8"].is_active
    assert views["9"].reason == "launch failed requeued held"
