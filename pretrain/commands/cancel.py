"""``pretrain cancel RUN``: have a run save and stop, take it out of the queue, or with ``--now`` kill it."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from launchers.watch.summary import RunSummary

POLL_S = 0.5
SLURM_POLL_S = 10.0
FORCE_AFTER_S = 15.0
"""With ``--now``: how long the run's own supervisor may take before it is killed as well."""
_TELL_EVERY_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pretrain.commands.watching import add_run_arguments

    add_run_arguments(parser, several=True)
    parser.add_argument("--now", action="store_true", help="kill it without a checkpoint")
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait until it has stopped")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.commands.watching import guarded

    return guarded(lambda: _cancel(arguments))


def _cancel(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.watch.find import resolve_run

    # All names are understood before anything is stopped.
    paths = [resolve_run(name, arguments.root) for name in arguments.runs]
    asked = [path for path in paths if _request(path, now=arguments.now)]
    done = True
    try:
        for path in asked:
            if not arguments.no_wait or arguments.now:
                done = _wait(path, now=arguments.now) and done
            else:
                print(f"{path.name}: asked to save and stop; `pretrain status {path.name}` shows when it has")
    except KeyboardInterrupt:
        names = ", ".join(path.name for path in asked)
        print(f"\nno longer waiting; {names} will stop all the same once its checkpoint is written")
        return 130
    return ExitCode.FINISHED if done else ExitCode.FAILED


def _request(path: Path, *, now: bool) -> bool:
    """Leaves the wish and takes a waiting job out of the queue; whether there is something to wait for.

    Raises ValueError when the wish cannot be left.
    """
    from launchers.lifecycle import cancellation, journal
    from launchers.run_dir import RunDir
    from launchers.watch.state import State
    from launchers.watch.summary import summarise_one

    run = RunDir.open(path)
    summary, fault = summarise_one(path)
    if not summary.is_active and summary.state != State.LOST:
        if summary.state == State.CANCELLED:
            _record_cancelled(run, summary.job)
        ended = f" ({summary.note})" if summary.note else ""
        print(f"{path.name}: nothing to cancel, it is {summary.state}{ended}")
        return False
    try:
        # First the wish, then the queue: a job that starts in between finds it.
        cancellation.request(run, now=now)
        journal.append(run, "cancel_requested", now=now, by=f"{getpass.getuser()}@{socket.gethostname()}")
    except OSError as error:
        raise ValueError(
            f"{path}: the request cannot be written ({error.strerror}); you need write permission there"
            + (f", or stop its job with `scancel {summary.job}`" if summary.job else "")
        ) from error
    if summary.state in (State.PENDING, State.REQUEUED) and summary.job is not None:
        if fault is not None:
            print(f"{path.name}: job {summary.job} was not taken out of the queue ({fault}); it will stop at its start")
            return False
        return not _leave_queue(run, summary.job)
    if summary.state == State.LOST:
        at_slurm = f"; Slurm was not asked ({fault}): `scancel {summary.job}` makes sure" if fault is not None else ""
        print(
            f"{path.name}: lost ({summary.note}): nothing is left to stop; a process that still runs somewhere finds "
            f"the request{at_slurm}"
        )
        return False
    return True


def _record_cancelled(run: RunDir, job: str | None) -> None:
    """A job that left the queue by scancel alone told nobody: without this the tracker shows it waiting for ever."""
    from launchers.lifecycle import journal
    from launchers.outcome import tell_tracker
    from pretrain.tracking.lifecycle import run_status

    status = run_status(journal.read_journal(run), None)
    if status is not None and status.name == "SCHEDULED":
        with contextlib.suppress(OSError):  # another user's run: it is still said what it is
            journal.append(run, "cancelled", job=job)
            tell_tracker(run)


def _leave_queue(run: RunDir, job: str) -> bool:
    """Cancels a job that waits; False when it has started meanwhile. Raises SlurmError."""
    from launchers.lifecycle import journal
    from launchers.outcome import tell_tracker
    from launchers.slurm.commands import Slurm
    from launchers.watch.jobs import ask_slurm

    if not job.isdigit():
        raise ValueError(f"{run.lifecycle_path}: job {job!r} is no job id of Slurm; cancel it by hand with scancel")
    Slurm().cancel(int(job), only_pending=True)
    view = ask_slurm([job]).views.get(job)
    if view is not None and view.is_active:
        return False
    journal.append(run, "cancelled", job=job)
    print(f"{run.path.name}: job {job} taken out of the queue")
    tell_tracker(run)
    return True


def _wait(path: Path, *, now: bool) -> bool:
    """Waits until nobody works on the run any more; with ``now`` kills a supervisor that does not see to it."""
    from launchers.run_dir import RunDir

    begun, asked, told = time.monotonic(), float("-inf"), float("-inf")
    forced = False
    words = ""
    with _Display() as display:
        while True:
            elapsed = time.monotonic() - begun
            ask = elapsed - asked >= SLURM_POLL_S
            summary = _look(path, ask=ask)
            if ask:
                asked = elapsed
            if not _is_at_work(summary):
                break
            if ask and _left_queue_again(path, summary):
                return True
            new = _progress(summary, now)
            if new != words or elapsed - told >= _TELL_EVERY_S:
                told, words = elapsed, new
                display.tell(f"{path.name}: {new}", elapsed)
            else:
                display.tick(f"{path.name}: {new}", elapsed)
            if now and not forced and (elapsed >= FORCE_AFTER_S or not _has_supervisor(path)):
                forced = True
                if not _force(RunDir(path), summary):
                    return False
            time.sleep(POLL_S)
    _tell_end(path)
    return True


def _look(path: Path, *, ask: bool) -> RunSummary:
    from launchers.watch.summary import summarise, summarise_one

    return summarise_one(path)[0] if ask else summarise(path)


def _is_at_work(summary: RunSummary) -> bool:
    from launchers.watch.state import State

    if summary.state in (State.PENDING, State.REQUEUED):
        # Queued again although it was to stop: the request was left while its attempt was ending.
        return True
    return summary.is_active


def _left_queue_again(path: Path, summary: RunSummary) -> bool:
    """Takes a job out of the queue that came back there while it was to stop: it need not start to find the wish."""
    from launchers.run_dir import RunDir
    from launchers.slurm.commands import SlurmError
    from launchers.watch.state import State

    if summary.state not in (State.PENDING, State.REQUEUED) or not (summary.job or "").isdigit():
        return False
    try:
        return _leave_queue(RunDir(path), str(summary.job))
    except SlurmError:
        return False  # the next look tries again; a job that starts meanwhile finds the wish


def _has_supervisor(path: Path) -> bool:
    from launchers.lease import shows_life
    from launchers.watch.summary import read_holder

    holder = read_holder(path)
    return holder is not None and shows_life(holder)


def _progress(summary: RunSummary, now: bool) -> str:
    from pretrain.commands.watching import progress

    what = "asked to end" if now else "asked to save and stop"
    phase = f", {summary.phase}" if summary.phase else ""
    return f"{what}; {summary.state} at step {progress(summary)}{phase}"


def _force(run: RunDir, summary: RunSummary) -> bool:
    """Kills what does not end by itself; False when it cannot be reached from here."""
    from launchers.lease import is_here, shows_life
    from launchers.lifecycle import journal
    from launchers.outcome import tell_tracker
    from launchers.slurm.commands import Slurm
    from launchers.watch.summary import read_holder
    from pretrain.commands.watching import warn

    if summary.job is not None and summary.job.isdigit():
        Slurm().cancel(int(summary.job))
        journal.append(run, "cancelled", job=summary.job)
        warn(f"{run.path.name}: no supervisor saw to it: cancelled job {summary.job}")
        tell_tracker(run)
        return True
    holder = read_holder(run.path)
    if holder is None or not shows_life(holder):
        return True
    if not is_here(holder):
        warn(
            f"{run.path.name}: its supervisor, process {holder.pid} on {holder.host}, does not answer and cannot be "
            f"reached from here; there, `kill -9 {holder.pid}` ends it"
        )
        return False
    try:
        os.kill(holder.pid, signal.SIGKILL)  # its ranks die with it
    except ProcessLookupError:
        return True
    except PermissionError:
        warn(f"{run.path.name}: process {holder.pid} is another user's; ask them, or the machine's administrator")
        return False
    journal.append(run, "cancelled", job=None)
    warn(f"{run.path.name}: its supervisor did not answer: killed process {holder.pid}")
    tell_tracker(run)
    return True


def _tell_end(path: Path) -> None:
    from launchers.watch.summary import summarise_one
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.commands.launch import program, shown

    summary, _ = summarise_one(path)
    saved = CheckpointStore(path / "checkpoints").latest()
    kept = f"{saved.name} is saved" if saved is not None else "no checkpoint was saved"
    line = f"{path.name}: {summary.state}"
    if summary.step is not None:
        line += f" at step {summary.step}"
    print(f"{line}; {kept}")
    if summary.state not in ("finished",):
        print(f"Continue with: {program()} resume {shown(path)}")


class _Display:
    """A spinner on a terminal, a line whenever something changes in a pipe."""

    def __init__(self) -> None:
        from pretrain.commands.watching import is_terminal, make_console

        self._status = None
        if is_terminal():
            self._status = make_console().status("", spinner="dots")

    def __enter__(self) -> _Display:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, words: str, elapsed: float) -> None:
        if self._status is None:
            print(f"{words} ({elapsed:.0f} s)", flush=True)
        else:
            self.tick(words, elapsed)

    def tick(self, words: str, elapsed: float) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(f"{words} ({elapsed:.0f} s)"))
