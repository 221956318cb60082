"""``pretrain logs`` and ``cancel``: over restarts, with supervisors that hear and such that do not, on a real run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain
from support.watched_run import WatchedRun

from launchers.lifecycle.journal import read_journal
from launchers.slurm.commands import SlurmError
from launchers.watch.state import State
from launchers.watch.summary import summarise
from pretrain.cli import main
from pretrain.commands import cancel, logs

Capture = pytest.CaptureFixture[str]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
    return value


# ---- logs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> WatchedRun:
    run = WatchedRun(tmp_path / "runs" / "demo", launcher="local")
    run.started(1)
    run.held(1)
    run.log(1, 0, "one\ntwo\nthree\n")
    run.log(1, 1, "of rank 1\n")
    return run


@pytest.mark.parametrize("lines", range(6))
@pytest.mark.parametrize("text", [b"one\ntwo\nthree\n", b"one\ntwo\nthree", b"\n\n\n", b""])
@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_the_last_lines_are_those_that_tail_shows(
    tmp_path: Path, lines: int, text: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_CHUNK", chunk)
    path = tmp_path / "log"
    path.write_bytes(text)
    whole = text.splitlines(keepends=True)
    assert text[logs.tail_offset(path, lines) :] == b"".join(whole[max(0, len(whole) - lines) :])


def test_logs_of_ranks_and_attempts(logged: WatchedRun, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    logged.log(2, 0, "later\n")

    def shown(*options: str) -> tuple[int, bytes, bytes]:
        code = main(["logs", str(logged.path), *options])
        captured = capfdbinary.readouterr()
        return code, captured.out, captured.err

    assert shown()[:2] == (0, b"later\n")
    assert shown("--attempt", "1")[:2] == (0, b"one\ntwo\nthree\n")
    assert shown("--attempt", "1", "-n", "2")[:2] == (0, b"two\nthree\n")
    assert shown("--rank", "1")[:2] == (0, b"of rank 1\n")
    code, out, err = shown("--rank", "7", "--attempt", "1")
    assert (code, out) == (2, b"")
    assert b"no log of rank 7 in attempt 1; attempt 1 has logs of ranks 0 to 1" in err
    assert shown("--attempt", "9")[0] == 2
    # Under Slurm its job tells, too; jobs count in the order of their numbers.
    (logged.path / "slurm").mkdir()
    (logged.path / "slurm" / "job_9.log").write_text("old job\n")
    (logged.path / "slurm" / "job_10.log").write_text("new job\n")
    both = b"==> slurm/job_10.log <==\nnew job\n==> logs/attempt_0002/rank_00000.log <==\nlater\n"
    assert shown()[:2] == (0, both)
    assert shown("--job")[:2] == (0, b"new job\n")
    assert shown("--attempt", "2")[:2] == (0, b"later\n")
    assert shown("--rank", "0")[:2] == (0, b"later\n")


@pytest.fixture
def follow() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts ``pretrain logs -f``; what is still running at the end of the test is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def call(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pretrain.cli", "logs", "-f", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


class Output:
    """What a followed process has written so far."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.data = process, b""

    def has(self, text: bytes) -> bool:
        assert self.process.stdout is not None
        self.data += self.process.stdout.read() or b""
        return text in self.data


def test_following_goes_over_restarts_to_the_end(logged: WatchedRun, follow: Callable[..., Any]) -> None:
    process = follow(logged.path, "-n", "1")
    output = Output(process)
    until(lambda: output.has(b"three\n"), "the last line there was")
    logged.log(1, 0, "four\nhalf a li")
    until(lambda: output.has(b"half a li"), "text as it comes")
    # The end of one attempt and the whole of the next come between two looks.
    logged.log(1, 0, "ne\n")
    logged.ended(1, "killed", "restart")
    logged.started(2)
    logged.held(2)
    logged.log(2, 0, "again\n")
    until(lambda: output.has(b"again\n"), "the next attempt's log")
    assert process.poll() is None
    logged.log(2, 0, "bye\n")
    logged.ended(2, "finished")
    logged.held(2, released=True)
    until(lambda: output.has(b"\0") or process.poll() is not None, "the end of the run")
    output.has(b"")
    assert process.returncode == 0
    assert output.data.decode() == ("three\nfour\nhalf a line\n==> logs/attempt_0002/rank_00000.log <==\nagain\nbye\n")
    assert process.stderr is not None
    assert b"demo is finished" in process.stderr.read()


def test_a_job_and_its_rank_are_followed_together(logged: WatchedRun, follow: Callable[..., Any]) -> None:
    (logged.path / "slurm").mkdir()
    job = logged.path / "slurm" / "job_7.log"
    job.write_text("begun\n")
    process = follow(logged.path)
    output = Output(process)
    until(lambda: output.has(b"three\n"), "both logs")
    logged.log(1, 0, "no end of line")
    until(lambda: output.has(b"no end of line"), "the rank's log")
    with open(job, "a") as stream:
        stream.write("asked to stop\n")
    until(lambda: output.has(b"asked to stop\n"), "the job's log")
    assert output.data.decode() == (
        "==> slurm/job_7.log <==\nbegun\n==> logs/attempt_0001/rank_00000.log <==\none\ntwo\nthree\nno end of line\n"
        "==> slurm/job_7.log <==\nasked to stop\n"
    )


def test_following_waits_for_the_first_log(logged: WatchedRun, follow: Callable[..., Any]) -> None:
    process = follow(logged.path, "--rank", "3")
    output = Output(process)
    logged.log(1, 3, "late\n")
    until(lambda: output.has(b"late\n"), "a log that did not exist at the start")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_reader_that_leaves_is_no_fault(logged: WatchedRun) -> None:
    logged.log(1, 0, "x" * 100 + "\n" * 100_000)
    command = f"{sys.executable} -m pretrain.cli logs {logged.path} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("one\n", "")


# ---- cancel ------------------------------------------------------------------------------------------------------

SUPERVISOR = """
import sys, time
from launchers.lease import Lease
from launchers.lifecycle import cancellation, journal
from launchers.run_dir import RunDir
run = RunDir.open(sys.argv[1])
with Lease.acquire(run) as lease:
    journal.append(run, "attempt_started", attempt=lease.attempt, launcher="local", job=None, nodes=["here"],
                   num_processes=1)
    print("ready", flush=True)
    while (wish := cancellation.read(run)) is None:
        time.sleep(0.05)
    journal.append(run, "attempt_ended", attempt=lease.attempt, exit_class="interrupted", action="stop",
                   reason=f"cancelled by its user, now={wish.now}", saved_step=None)
"""


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[tuple[WatchedRun, subprocess.Popen[str]]]:
    """A run and a process that supervises it as launchers do: lease, journal, and an eye on the wish to cancel."""
    run = WatchedRun(tmp_path / "runs" / "demo", launcher="local")
    command = [sys.executable, "-c", SUPERVISOR, str(run.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield run, process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("now", [False, True])
def test_cancel_asks_and_waits(supervised: tuple[WatchedRun, Any], now: bool, capsys: Capture) -> None:
    run, process = supervised
    assert main(["cancel", str(run.path), *(["--now"] if now else [])]) == 0
    assert process.poll() is not None or process.wait(30) == 0
    summary = summarise(run.path)
    assert (summary.state, summary.note) == (State.CANCELLED, f"cancelled by its user, now={now}")
    request = next(entry for entry in read_journal(run.run) if entry["event"] == "cancel_requested")
    assert request["now"] is now
    assert "@" in request["by"]
    out = capsys.readouterr().out
    assert ("asked to end" if now else "asked to save and stop") in out
    assert "demo: cancelled; no checkpoint was saved" in out
    assert "resume " in out


def test_cancel_without_waiting(supervised: tuple[WatchedRun, Any], capsys: Capture) -> None:
    run, process = supervised
    assert main(["cancel", "demo", "--root", str(run.path.parent), "--no-wait"]) == 0
    assert "`pretrain status demo` shows when it has" in capsys.readouterr().out
    assert process.wait(30) == 0


def test_cancel_now_kills_a_supervisor_that_does_not_answer(
    supervised: tuple[WatchedRun, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cancel, "FORCE_AFTER_S", 0.2)
    run, process = supervised
    process.send_signal(signal.SIGSTOP)
    assert main(["cancel", str(run.path), "--now"]) == 0
    assert process.wait(30) == -signal.SIGKILL
    assert summarise(run.path).state == State.CANCELLED
    assert f"killed process {process.pid}" in capsys.readouterr().err


def test_cancel_now_says_when_the_supervisor_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cancel, "FORCE_AFTER_S", 0.2)
    run = WatchedRun(tmp_path / "demo", launcher="local")
    run.started(1)
    run.held(1, here=False)
    assert main(["cancel", str(run.path), "--now"]) == 1
    assert f"process {os.getpid()} on elsewhere, does not answer" in capsys.readouterr().err


def test_a_job_that_was_queued_again_while_it_was_to_stop_leaves_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cancel, "SLURM_POLL_S", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = WatchedRun(tmp_path / "demo")
    run.submitted(7)
    run.started(1, 7)
    run.ended(1, "preempted", "requeue")
    run.journal("requeued", job=7, exclude=[])
    asked = []

    class Queue:
        def cancel(self, job: int, *, only_pending: bool) -> None:
            asked.append((job, only_pending))
            if len(asked) == 1:
                raise SlurmError("does not answer")

    monkeypatch.setattr("launchers.slurm.commands.Slurm", Queue)
    assert cancel._wait(run.path, now=False)
    assert asked == [(7, True), (7, True)]
    assert "job 7 taken out of the queue" in capsys.readouterr().out
    assert read_journal(run.run)[-1]["event"] == "cancelled"


def test_there_may_be_nothing_to_cancel(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "runs"
    for name, exit_class in (("tiny", "finished"), ("ablation", "crash"), ("hybrid", None)):
        run = WatchedRun(root / name)
        run.started(1)
        if exit_class is not None:
            run.ended(1, exit_class, reason="rank 3 fell over")
    run.held(1)
    assert main(["cancel", "tiny", "abl", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "nothing to cancel, it is finished" in out
    assert "nothing to cancel, it is failed (rank 3" in out
    assert not list(root.glob("*/cancel.json"))
    # One wrong name among several, and none is touched.
    assert main(["cancel", "hybrid", "gamma", "--root", str(root)]) == 3
    assert not list(root.glob("*/cancel.json"))


def test_a_queued_run_whose_slurm_cannot_be_asked_stops_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = WatchedRun(tmp_path / "demo")
    run.submitted(7)
    assert main(["cancel", str(run.path)]) == 0
    assert "job 7 was not taken out of the queue (squeue: no such command here" in capsys.readouterr().out
    assert run.run.cancel_path.exists()


# ---- a real run --------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_real_run_is_watched_followed_and_cancelled(
    data_path: Path, tmp_path: Path, follow: Callable[..., Any]
) -> None:
    from support.small_text import small_run

    path = tmp_path / "runs" / "real"
    command = [sys.executable, "-m", "pretrain.cli", "run", "--run-dir", str(path), *small_run(data_path)]
    more = ["train.steps=1000000", "train.eval_interval=0"]
    with open(tmp_path / "output", "w") as output_file:
        trainer = subprocess.Popen([*command, *more], cwd=tmp_path, stdout=output_file, stderr=output_file)
    try:
        until(lambda: (path / "config.yaml").exists(), "the run directory")
        output = Output(follow(path))
        until(lambda: summarise(path).state == State.RUNNING, "the first step", 240)
        until(lambda: (summarise(path).step or 0) >= 2, "more steps")
        status = json.loads(pretrain("status", path, "--json", cwd=tmp_path).stdout)
        assert (status["state"], status["attempt"], status["num_processes"]) == ("running", 1, 1)
        assert [beat["rank"] for beat in status["details"]["beats"]] == [0]
        assert status["eta_s"] > 0
        result = pretrain("cancel", "real", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert trainer.wait(120) == 85, (tmp_path / "output").read_text()
        summary = summarise(path)
        assert summary.state == State.CANCELLED
        assert summary.attempts[-1].saved_step == summary.step
        assert f"cancelled at step {summary.step}; step_{summary.step:08d} is saved" in result.stdout
        until(lambda: output.process.poll() is not None, "the follower's end")
        output.has(b"")
        assert output.process.returncode == 0
        assert b"interrupted" in output.data
    finally:
        trainer.kill()
        trainer.wait()
