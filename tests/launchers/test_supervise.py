"""Attempt after attempt with small programs as local ranks: what is journalled, what follows, what the caller gets."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launchers.lease import Lease
from launchers.lifecycle import cancellation
from launchers.lifecycle.backend import NodeTrouble, StartError
from launchers.lifecycle.exclusions import excluded_nodes
from launchers.lifecycle.exit_class import ExitClass, StopReason
from launchers.lifecycle.journal import append, read_journal
from launchers.lifecycle.memory import OomKills
from launchers.lifecycle.supervise import Outcome, Supervisor
from launchers.local import LocalBackend
from launchers.run_dir import RunDir
from pretrain.config.launch_schema import LifecycleConfig, LocalConfig
from pretrain.config.schema import Config
from pretrain.tracking.metrics_log import read_records

PROLOGUE = """
import json, os, signal, sys, time
from pathlib import Path
RUN, RANK, ATTEMPT = Path(sys.argv[1]), int(os.environ["SLURM_PROCID"]), int(os.environ["PRETRAIN_ATTEMPT"])

def log(event, **fields):
    with open(RUN / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"time": time.time(), "attempt": ATTEMPT, "event": event, **fields}) + "\\n")

def train(first, last):
    if RANK == 0:
        log("start", step=first, steps=10)
        for step in range(first + 1, last + 1):
            log("train", step=step, metrics={"loss": 1.0, "step_s": 0.001})
"""


def supervise(run: RunDir, body: str, *, ranks: int = 2, max_restarts: int = 0, **lifecycle: Any) -> Outcome:
    """Follows attempts of ``body`` as every rank to their end."""
    config = SimpleNamespace(
        launcher=LocalConfig(num_processes=ranks, max_restarts=max_restarts, shutdown_grace_s=10.0),
        lifecycle=LifecycleConfig(**lifecycle),
    )
    with Lease.acquire(run) as lease:
        return Supervisor(
            run,
            LocalBackend(),
            lease,
            cast(Config, config),
            program=[sys.executable, "-c", PROLOGUE + textwrap.dedent(body), str(run.path)],
            command=["test"],
            first_arguments=["first"],
        ).supervise()


def ends(run: RunDir) -> list[dict[str, Any]]:
    return [entry for entry in read_journal(run) if entry["event"] == "attempt_ended"]


def test_one_attempt_to_the_end(run: RunDir) -> None:
    outcome = supervise(run, "train(0, 10)")
    assert (outcome.code, outcome.verdict.exit_class, outcome.decision.action) == (0, "finished", "stop")
    started, ended = read_journal(run)
    assert (started["event"], started["attempt"], started["launcher"], started["job"]) == (
        "attempt_started",
        1,
        "local",
        None,
    )
    assert (started["nodes"], started["num_processes"]) == ([socket.gethostname()], 2)
    assert (ended["exit_class"], ended["action"], ended["first_step"], ended["last_step"]) == (
        "finished",
        "stop",
        0,
        10,
    )


def test_a_killed_rank_is_restarted_and_the_chosen_checkpoint_is_the_first_attempt_s(run: RunDir) -> None:
    body = """
    assert sys.argv[2:] == (["first"] if ATTEMPT == 1 else [])
    train(3 * (ATTEMPT - 1), 3 * ATTEMPT)
    (RUN / f"trained{ATTEMPT}{RANK}").touch()
    if ATTEMPT < 3 and RANK == 1:
        while not (RUN / f"trained{ATTEMPT}0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    outcome = supervise(run, body, max_restarts=5)
    assert outcome.code == 0
    first, second, third = ends(run)
    assert [e["exit_class"] for e in (first, second, third)] == ["killed", "killed", "finished"]
    assert [e["action"] for e in (first, second, third)] == ["restart", "restart", "stop"]
    assert (first["rank"], first["code"], first["node"]) == (1, 137, socket.gethostname())
    assert (second["first_step"], second["last_step"]) == (3, 6)
    assert [e["attempt"] for e in read_journal(run) if e["event"] == "attempt_started"] == [1, 2, 3]
    failures = [record for record in read_records(run.metrics_path) if record["event"] == "failure"]
    assert [(f["attempt"], f["rank"], f["code"]) for f in failures] == [(1, 1, 137), (2, 1, 137)]


def test_a_crash_loop_stops_with_the_culprit_s_code(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = supervise(run, "train(0, 4)\nsys.exit('no luck')", ranks=1, max_restarts=9, max_repeats=3)
    assert (outcome.code, outcome.decision.action) == (1, "stop")
    assert [e["action"] for e in ends(run)] == ["restart", "restart", "stop"]
    assert "3 times in a row without a new step" in ends(run)[-1]["reason"]
    shown = capsys.readouterr().err
    assert "| no luck" in shown
    assert "Starting the next attempt" in shown


def test_without_restarts_a_failure_ends_it(run: RunDir) -> None:
    outcome = supervise(run, "sys.exit(6 if RANK == 1 else 0)")
    assert outcome.code == 6
    assert "on_data_fault is stop" in ends(run)[0]["reason"]
    outcome = supervise(run, "os.kill(os.getpid(), signal.SIGSEGV)", ranks=1)
    assert outcome.code == 139
    assert "launcher.max_restarts is 0" in ends(run)[1]["reason"]


def test_what_a_rank_says_of_its_end_is_the_reason(run: RunDir) -> None:
    body = """
    from launchers.lifecycle.end_record import write_end_record
    from launchers.run_dir import RunDir
    run = RunDir.open(RUN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (RUN / f"ready{RANK}").touch()
    if RANK == 0:
        while not (RUN / "ready1").exists():
            time.sleep(0.01)
        write_end_record(run, ATTEMPT, 0, 1, "crash", "RuntimeError: Connection closed by peer", consequence=True)
        sys.exit(1)
    while not run.end_record_path(ATTEMPT, 0).exists():
        time.sleep(0.01)
    write_end_record(run, ATTEMPT, 1, 1, "crash", "KeyError: 'weight'")
    sys.exit(1)
    """
    outcome = supervise(run, body)
    assert (outcome.verdict.rank, outcome.verdict.exit_class) == (1, ExitClass.CRASH)
    assert "KeyError: 'weight'" in ends(run)[0]["reason"]


STOPPABLE = """
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
train(0, 2)
(RUN / f"ready{RANK}").touch()
"""


def asked(name: str) -> str:
    """Two ranks that are asked to stop by the signal ``name`` once both are ready for it."""
    return STOPPABLE + textwrap.dedent(f"""
    if RANK == 0:
        while not (RUN / "ready1").exists():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.{name})
    while not stopped:
        time.sleep(0.01)
    """)


def test_a_signal_stops_with_a_checkpoint_and_nothing_follows(run: RunDir) -> None:
    body = asked("SIGUSR1") + textwrap.dedent("""
    sys.exit(85)
    """)
    outcome = supervise(run, body, max_restarts=9)
    assert (outcome.code, outcome.verdict.exit_class, outcome.decision.action) == (85, "interrupted", "stop")
    assert "SIGUSR1" in ends(run)[0]["reason"]


def test_handlers_of_the_caller_are_restored(run: RunDir) -> None:
    before = signal.getsignal(signal.SIGTERM)
    supervise(run, "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("now", [False, True])
def test_a_cancellation_is_heard(run: RunDir, now: bool) -> None:
    body = STOPPABLE + textwrap.dedent(f"""
    from launchers.lifecycle.cancellation import request
    from launchers.run_dir import RunDir
    if RANK == 0:
        while not (RUN / "ready1").exists():
            time.sleep(0.01)
        request(RunDir.open(RUN), now={now})
    while {now} or not stopped:
        time.sleep(0.01)
    sys.exit(85)
    """)
    outcome = supervise(run, body, max_restarts=9)
    assert (outcome.verdict.exit_class, outcome.decision.action) == ("interrupted", "stop")
    assert outcome.code == (137 if now else 85)
    assert "cancelled by its user" in ends(run)[0]["reason"]
    assert cancellation.read(run) is not None  # it stands until the user starts the run again


@pytest.mark.parametrize("earlier", [None, ExitClass.PREEMPTED])
def test_a_job_that_is_cancelled_is_noted_at_once_and_does_not_come_back(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, earlier: ExitClass | None
) -> None:
    reasons = {
        signal.SIGUSR1: StopReason(earlier, "to leave") if earlier else None,
        signal.SIGTERM: StopReason(ExitClass.INTERRUPTED, "the job was cancelled", enforced=True),
        None: None,
    }
    monkeypatch.setattr(LocalBackend, "queue", True)
    monkeypatch.setattr(LocalBackend, "job", 7)
    monkeypatch.setattr(LocalBackend, "second_signal_kills", False)
    monkeypatch.setattr(LocalBackend, "reason_of", lambda self, number: reasons[number])
    body = STOPPABLE + textwrap.dedent("""
    if RANK == 0:
        while not (RUN / "ready1").exists():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGUSR1)
        while ASKED_BEFORE and not stopped:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
    while not stopped or '"cancelled"' not in (RUN / "lifecycle.jsonl").read_text():
        time.sleep(0.01)
    sys.exit(85)
    """)
    outcome = supervise(run, f"ASKED_BEFORE = {earlier is not None}\n{body}", max_restarts=9)
    assert (outcome.verdict.exit_class, outcome.decision.action) == ("interrupted", "stop")
    assert [entry["event"] for entry in read_journal(run)] == ["attempt_started", "cancelled", "attempt_ended"]


def test_a_cancelled_attempt_whose_end_nobody_recorded_was_not_preempted(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBackend, "queue", True)
    monkeypatch.setattr(LocalBackend, "job", 7)
    Lease.acquire(run).release()
    append(run, "attempt_started", attempt=1, launcher="slurm", job=7, nodes=["n1"], num_processes=2)
    append(run, "cancelled", job=7)
    supervise(run, "train(0, 10)")
    assert [(end["exit_class"], end["action"]) for end in ends(run)] == [("interrupted", "stop"), ("finished", "stop")]


def test_a_rank_that_had_saved_when_it_was_asked_once_more_has_saved(run: RunDir) -> None:
    body = asked("SIGTERM") + textwrap.dedent("""
    from launchers.lifecycle.end_record import write_end_record
    from launchers.run_dir import RunDir
    write_end_record(RunDir.open(RUN), ATTEMPT, RANK, 85, "interrupted", "")
    if RANK == 1:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGUSR1)  # the second request, on its way out
    sys.exit(85)
    """)
    outcome = supervise(run, body, max_restarts=9)
    assert (outcome.code, outcome.verdict.exit_class, outcome.decision.action) == (85, "interrupted", "stop")
    assert "the ranks saved" in ends(run)[0]["reason"]


def test_a_rank_that_is_killed_while_it_saves_leaves_the_others_little_time(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launchers.lifecycle.attempt.AFTER_DEATH_S", 0.5)
    body = asked("SIGTERM") + textwrap.dedent("""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # waits for the other one
    """)
    outcome = supervise(run, body, max_restarts=9)
    assert (outcome.code, outcome.decision.action) == (137, "stop")
    assert "ranks still running 0.5 s after" in capsys.readouterr().err


@pytest.mark.parametrize(("anyone_s", "exit_class"), [(True, "crash"), (False, "host_memory")])
def test_a_kill_for_memory_of_another_s_process_is_not_this_run_s(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, anyone_s: bool, exit_class: str
) -> None:
    counts = iter(range(100))
    monkeypatch.setattr("launchers.local.oom_kills", lambda: OomKills(next(counts), anyone_s))
    assert supervise(run, "sys.exit(1)", ranks=1).verdict.exit_class == exit_class
    killed = supervise(run, "os.kill(os.getpid(), signal.SIGKILL)", ranks=1)
    assert killed.verdict.exit_class == "host_memory"


def test_ranks_are_asked_before_the_time_ends_and_a_new_allocation_is_wanted(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    end = time.time() + 3600.0
    monkeypatch.setattr(LocalBackend, "end_time", lambda self: end)
    monkeypatch.setattr(LocalBackend, "queue", True)
    body = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    if RANK == 0:
        log("checkpoint", step=1, seconds=3600.0)
    time.sleep(600)
    """
    outcome = supervise(run, body, max_restarts=9)
    assert (outcome.verdict.exit_class, outcome.decision.action) == ("time_limit", "requeue")
    assert not outcome.decision.at_once


def test_the_end_of_an_attempt_that_nobody_recorded_is_recorded(run: RunDir) -> None:
    Lease.acquire(run).release()
    append(run, "attempt_started", attempt=1, launcher="local", job=None, nodes=["n1"], num_processes=2)
    supervise(run, "train(0, 10)")
    first, second = ends(run)
    assert (first["attempt"], first["exit_class"], first["action"]) == (1, "killed", "stop")
    assert (second["attempt"], second["exit_class"]) == (2, "finished")


def test_a_life_that_came_back_by_itself_too_often_is_stopped(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBackend, "queue", True)
    monkeypatch.setattr(LocalBackend, "job", 7)
    for attempt in (1, 2, 3):
        Lease.acquire(run).release()
        append(run, "attempt_started", attempt=attempt, launcher="slurm", job=7, nodes=["n1"], num_processes=2)
        if attempt < 3:
            append(run, "attempt_ended", attempt=attempt, exit_class="killed", action="requeue", last_step=None)
    outcome = supervise(run, "raise AssertionError('must not start')", max_restarts=9)
    assert outcome.decision.action == "stop"
    assert "3 times in a row" in ends(run)[-1]["reason"]
    assert not run.rank_log_path(4, 0).exists()


def test_ranks_that_cannot_be_started_are_an_end_like_any_other(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise StartError("no address of rank 0", ExitClass.USER_ERROR)

    monkeypatch.setattr(LocalBackend, "start", start)
    outcome = supervise(run, "", max_restarts=9)
    assert (outcome.code, outcome.verdict.exit_class) == (1, "user_error")
    assert "no address of rank 0" in ends(run)[0]["reason"]


def in_a_job(monkeypatch: pytest.MonkeyPatch, reasons: dict[int | None, StopReason | None]) -> None:
    """Local ranks, as if they were those of a job about which Slurm says ``reasons``."""
    monkeypatch.setattr(LocalBackend, "queue", True)
    monkeypatch.setattr(LocalBackend, "job", 7)
    monkeypatch.setattr(LocalBackend, "second_signal_kills", False)
    monkeypatch.setattr(LocalBackend, "reason_of", lambda self, number: reasons.get(number))


SIGNALLED_THEN_KILLED = STOPPABLE + textwrap.dedent("""
if ATTEMPT > 1:
    sys.exit(0)
if RANK == 0:
    while not (RUN / "ready1").exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGUSR1)
    while ASKED and not stopped:
        time.sleep(0.01)
    if not ASKED:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
while not stopped:
    time.sleep(0.01)
sys.exit(85)
""")


@pytest.mark.parametrize(
    ("meaning", "expected"),
    [
        (StopReason(ExitClass.PREEMPTED, "the job is preempted"), [("killed", "requeue")]),
        (StopReason(ExitClass.INTERRUPTED, "the job was cancelled"), [("killed", "stop")]),
        (None, [("killed", "restart"), ("finished", "stop")]),  # a notice that asks for nothing spoils nothing
    ],
)
def test_a_rank_that_dies_after_a_request_does_not_change_what_was_asked(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, meaning: StopReason | None, expected: list[tuple[str, str]]
) -> None:
    in_a_job(monkeypatch, {signal.SIGUSR1: meaning})
    supervise(run, f"ASKED = {meaning is not None}\n{SIGNALLED_THEN_KILLED}", max_restarts=9)
    assert [(end["exit_class"], end["action"]) for end in ends(run)] == expected


@pytest.mark.parametrize("path", ["check", "start"])
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (StopReason(ExitClass.PREEMPTED, "queued again from outside", enforced=True), ("preempted", "requeue")),
        (StopReason(ExitClass.INTERRUPTED, "the job was cancelled", enforced=True), ("interrupted", "stop")),
        (None, None),
    ],
)
def test_a_start_that_the_end_of_the_job_spoils_is_that_end(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    told: StopReason | None,
    expected: tuple[str, str] | None,
) -> None:
    in_a_job(monkeypatch, {None: told})

    def start(*_: Any) -> None:
        raise StartError("`scontrol show node n1` was ended by SIGTERM", ExitClass.CRASH)

    monkeypatch.setattr(LocalBackend, "start", start)
    if path == "check":
        monkeypatch.setattr(LocalBackend, "check_nodes", lambda *_: NodeTrouble(("n2",), "n2: it did not answer"))
    outcome = supervise(run, "", max_restarts=9, max_repeats=1 if told is None else 3)
    end = ends(run)[0]
    assert (end["exit_class"], end["action"]) == (expected or ("node_failure" if path == "check" else "crash", "stop"))
    assert outcome.enforced == (told is not None)
    if told is not None:
        assert end["exclude"] == []
        noted = [entry["event"] for entry in read_journal(run)].count("cancelled")
        assert noted == (1 if told.exit_class == ExitClass.INTERRUPTED else 0)


def test_excluded_nodes_are_those_since_the_user_s_last_submission(run: RunDir) -> None:
    append(run, "submitted", job=1, script="s", kind="first", exclude=["a"])
    append(run, "requeued", job=1, exclude=["b"])
    append(run, "attempt_ended", attempt=1, exit_class="node_failure", action="exclude", node="c", exclude=["c"])
    append(run, "submitted", job=2, script="s", kind="chain", exclude=["b", "d"])
    assert excluded_nodes(read_journal(run)) == {"a", "b", "c", "d"}
    append(run, "submitted", job=3, script="s", kind="resume", exclude=[])
    assert excluded_nodes(read_journal(run)) == set()


def test_later_lives_of_a_job_take_over_at_once(run: RunDir) -> None:
    first = Lease.acquire(run, job="7", life=0, interval_s=0.01)
    with pytest.raises(Exception, match="held by process"):
        Lease.acquire(run, job="8", life=1)
    with pytest.raises(Exception, match="held by process"):
        Lease.acquire(run, job="7", life=0)
    with Lease.acquire(run, job="7", life=1) as second:
        assert second.attempt == 2
        assert first.lost.wait(30)
        first.release()


@pytest.fixture(autouse=True)
def _find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
