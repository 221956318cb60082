"""``python -m launchers.slurm.job RUN_DIR``: the supervisor inside a Slurm job, in the place of the batch script.

It takes Slurm's signals itself, runs attempts while this allocation serves, and then gives the job back to the queue,
chains a new one, or ends it. Nothing is composed here: the frozen configuration is all it knows. Torch-free.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launchers.exit_codes import ExitCode
from launchers.lease import HEARTBEAT_INTERVAL_S, STALE_AFTER_S, FencedError, Lease, LeaseHeldError, current_holder
from launchers.lifecycle import cancellation, journal
from launchers.lifecycle.attempt import say
from launchers.lifecycle.exit_class import ExitClass
from launchers.lifecycle.supervise import Outcome, Supervisor, default_program
from launchers.outcome import tell_tracker
from launchers.run_dir import RunDir, RunDirectoryError
from launchers.slurm.backend import SlurmBackend
from launchers.slurm.commands import Slurm, SlurmError
from launchers.slurm.elastic import at_full_size
from launchers.slurm.exclusion import readmit, settle
from launchers.slurm.start import Allocation, AllocationError
from launchers.slurm.submit import submit
from pretrain.config.check import check
from pretrain.config.files import way_out
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config

_COMMAND_TIMEOUT_S = 20.0
_PATIENCE_S = STALE_AFTER_S + 4 * HEARTBEAT_INTERVAL_S
_GONE_AFTER_S = 120.0
_TELL_S = 15.0
_ALREADY_QUEUED = "pending execution"
_INTERRUPTED = 130
"""As a shell has it for an interrupted program. Not 85: sites have jobs with that code queued again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a run from within its job; returns the job's exit code."""
    parser = argparse.ArgumentParser(prog="launchers.slurm.job", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args(argv)
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    # From the first moment to the last: Slurm's default for all of these is to end the process.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, remember)
    run: RunDir | None = None
    try:
        run = RunDir.open(arguments.run_dir)
        config = check(run.config())
        if not isinstance(config.launcher, SlurmConfig):
            raise RunDirectoryError(
                f"{run.path}: this job is of no use any more: the run has since been continued with "
                f"launcher={config.launcher.name}. To have it on Slurm again: pretrain resume {run.path} launcher=slurm"
            )
        slurm = Slurm(timeout_s=_COMMAND_TIMEOUT_S)
        allocation = Allocation.read(slurm=slurm)
        return _supervise(run, config, slurm, allocation, received)
    except FencedError as error:
        say(str(error))
        return int(ExitCode.RUN_DIRECTORY_REFUSED)
    except (RunDirectoryError, AllocationError, SlurmError) as error:
        say(f"error: {error}")
        refused = isinstance(error, RunDirectoryError)
        return int(ExitCode.RUN_DIRECTORY_REFUSED if refused else ExitCode.INVALID_INPUT)
    except ValueError as error:
        say(f"error: {error}")
        return int(ExitCode.INVALID_INPUT)
    except OSError as error:
        return _gave_up(run, arguments.run_dir, error)


def _gave_up(run: RunDir | None, path: Path, error: OSError) -> int:
    """The run directory, or this node, takes no more files: nothing can be supervised, and that is said for later."""
    what = f"{error.filename or path}: {error.strerror or error}"
    say(f"error: {what}; {way_out(error)}, then continue with: pretrain resume {path}")
    if run is not None:
        with contextlib.suppress(OSError, ValueError):
            holder = current_holder(run)
            job = os.environ.get("SLURM_JOB_ID", "")
            journal.append_making_room(
                run,
                holder.attempt if holder is not None else 0,
                "gave_up",
                job=int(job) if job.isdigit() else None,
                message=what,
            )
            tell_tracker(run, timeout_s=_TELL_S)
    return int(ExitCode.FAILED)


def _supervise(run: RunDir, config: Config, slurm: Slurm, allocation: Allocation, received: list[int]) -> int:
    job = allocation.job
    if cancellation.read(run) is not None:
        return _cancelled(run, slurm, job)
    lease = acquire(run, allocation)
    with lease:
        say(
            f"run directory {run.path}, job {job}, attempt {lease.attempt}, nodes {', '.join(allocation.nodes)}"
            + (f", queued again {allocation.restarts} time(s)" if allocation.restarts else "")
        )
        readmit(run, config, allocation)
        supervisor = Supervisor(
            run,
            SlurmBackend(allocation, slurm, received),
            lease,
            config,
            program=default_program(run),
            command=[sys.executable, "-m", "launchers.slurm.job", str(run.path)],
            between_attempts=lambda: tell_tracker(run),
            lease_job={"job": str(job), "life": allocation.restarts},
            received=received,
        )
        outcome = supervisor.supervise()
        supervisor.lease.release()
    if outcome.fenced:
        return int(ExitCode.RUN_DIRECTORY_REFUSED)
    say(f"{outcome.decision.reason}: {outcome.decision.action}")
    if outcome.decision.action == "stop":
        tell_tracker(run)
    else:
        return _back_to_queue(run, supervisor.config, slurm, allocation, outcome)
    if outcome.verdict.exit_class != ExitClass.FINISHED and cancellation.read(run) is not None:
        return _cancelled(run, slurm, job)
    if outcome.verdict.exit_class == ExitClass.INTERRUPTED:
        return _INTERRUPTED
    code = outcome.code
    finished = outcome.verdict.exit_class == ExitClass.FINISHED
    return code if finished or code not in (ExitCode.FINISHED, ExitCode.RESUMABLE) else int(ExitCode.FAILED)


def acquire(run: RunDir, allocation: Allocation, patience_s: float = _PATIENCE_S) -> Lease:
    """The lease of the next attempt. Whoever holds it may be about to let go: the job before this one of a chain, or
    one on a node that died. Raises LeaseHeldError when it is still held after ``patience_s`` seconds."""
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            return Lease.acquire(run, job=str(allocation.job), life=allocation.restarts)
        except LeaseHeldError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                say(f"waiting up to {patience_s:.0f} s for the run directory: {error}")
                told = True
            time.sleep(1.0)


def _cancelled(run: RunDir, slurm: Slurm, job: int) -> int:
    """Ends the job as what it is. The wish stays in the run directory until a user starts the run again."""
    journal.append(run, "cancelled", job=job)
    tell_tracker(run, timeout_s=_TELL_S)
    say(f"cancelled; continue with: pretrain resume {run.path}")
    try:
        slurm.cancel(job)
        _wait_for_the_end()
    except SlurmError as error:
        say(f"job {job} could not be marked cancelled: {error}")
    return _INTERRUPTED


def _back_to_queue(run: RunDir, config: Config, slurm: Slurm, allocation: Allocation, outcome: Outcome) -> int:
    """Queues the run again, by this job's id or in a new job; the process is ended by it."""
    launcher, job, life = config.launcher, allocation.job, allocation.restarts
    assert isinstance(launcher, SlurmConfig)
    if cancellation.read(run) is not None:  # while the ranks saved
        return _cancelled(run, slurm, job)
    if _is_cancelled(slurm, job, life):
        return _stays_cancelled(run, job)
    excluded = settle(run, config, slurm, job)
    if launcher.requeue_by == "requeue":
        # Before it happens: afterwards there may be no time left to write it.
        try:
            journal.append(run, "requeued", job=job, exclude=excluded)
        except OSError as error:  # there may be room again by the time the job runs
            say(f"that job {job} is queued again cannot be recorded: {error}")
        _tell_in_time(run, outcome)
        try:
            _requeue(slurm, job, excluded, launcher_excludes=config.cluster.exclude, life=life)
        except JobCancelledError:
            return _stays_cancelled(run, job)
        except SlurmError as error:
            say(f"job {job} cannot be queued again ({error}); submitting a new one")
        else:
            _wait_for_the_end()
            return int(ExitCode.RESUMABLE)
    try:
        new = submit(run, at_full_size(run, config), "chain", excluded, slurm=slurm)
    except (SlurmError, RunDirectoryError, ValueError) as error:
        say(f"error: the run could not be queued again: {error}\nContinue it with: pretrain resume {run.path}")
        journal.append(run, "requeue_failed", job=job, message=str(error))
        _tell_in_time(run, outcome)
        return int(ExitCode.FAILED)
    say(f"job {new} continues this run")
    _tell_in_time(run, outcome)
    return 0


def _tell_in_time(run: RunDir, outcome: Outcome) -> None:
    """Tells the tracker that the run waits again, in the queue or for its user, unless Slurm leaves no time for it;
    then the next life does."""
    if not outcome.enforced:
        tell_tracker(run, timeout_s=_TELL_S)


class JobCancelledError(RuntimeError):
    """Someone has ended this job for good: it must not come back."""


def _is_cancelled(slurm: Slurm, job: int, life: int) -> bool:
    try:
        info = slurm.job(job)
    except SlurmError:
        return False  # who cannot be asked does not take a requeue either
    return info is not None and info.is_cancelled(life)


def _stays_cancelled(run: RunDir, job: int) -> int:
    """A cancelled job would take a requeue and run once more, against the will of whoever cancelled it."""
    journal.append(run, "cancelled", job=job)
    say(f"job {job} was cancelled meanwhile; continue with: pretrain resume {run.path}")
    tell_tracker(run, timeout_s=_TELL_S)
    return _INTERRUPTED


def _requeue(slurm: Slurm, job: int, excluded: Sequence[str], launcher_excludes: Sequence[str], life: int = 0) -> None:
    """Raises SlurmError when the job is not in the queue afterwards, JobCancelledError when it was cancelled."""
    info = slurm.job(job)
    if info is not None and info.is_cancelled(life):
        raise JobCancelledError(f"job {job} was cancelled")
    if info is None or not info.is_pending:  # else Slurm, or its administrator, has done it already
        try:
            slurm.requeue(job)
        except SlurmError as error:
            # The same, while the job's processes are still being ended: it shows as completing, and a second job of
            # this run must not come of that.
            if _ALREADY_QUEUED not in str(error).lower():
                raise
    if not excluded and (info is None or not set(info.excluded) - set(launcher_excludes)):
        return
    # Slurm has told every process of the job to end, commands that we run included: they may need a second try.
    deadline = time.monotonic() + 10.0
    while True:
        try:
            slurm.update_excluded(job, {*excluded, *launcher_excludes})
            return
        except SlurmError as error:
            if time.monotonic() > deadline:
                say(f"job {job} is queued again, but its excluded nodes cannot be changed ({error})")
                return
            time.sleep(0.1)


def _wait_for_the_end() -> None:
    """Slurm ends this process; were it to return first, the job's end would overrule what was asked of Slurm."""
    deadline = time.monotonic() + _GONE_AFTER_S
    while time.monotonic() < deadline:
        time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
