"""Starting an attempt on a run directory: launcher, progress, summary. Shared by ``run`` and ``resume``."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.lease import Lease
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config


def launch_attempt(lease: Lease, config: Config, checkpoint: str | None = None) -> int:
    """Launch the ranks of the attempt that ``lease`` holds and wait; prints the summary of a finished run.

    Returns the ranks' exit code.
    """
    from launchers.exit_codes import ExitCode
    from launchers.local import launch
    from launchers.outcome import record_end, record_failure
    from launchers.progress import open_display
    from pretrain.checkpoint.store import CheckpointStore

    run = lease.run
    run.record_attempt(lease.attempt, ["pretrain", *sys.argv[1:]])
    print(f"run directory {shown(run.path)} (attempt {lease.attempt})", flush=True)
    command = [sys.executable, "-m", "pretrain.training.entry", str(run.path)]
    if checkpoint is not None:
        command += ["--checkpoint", checkpoint]
    code = launch(
        run,
        attempt=lease.attempt,
        num_processes=config.launcher.num_processes,
        threads_per_process=config.launcher.threads_per_process,
        shutdown_grace_s=config.launcher.shutdown_grace_s,
        command=command,
        display=open_display(run, lease.attempt),
        lost=lease.lost,
        on_failure=lambda rank, code, log: record_failure(run, lease.attempt, rank, code, log),
    )
    # Ranks that were killed could not say so themselves: neither in the run's record nor to the tracker.
    if not lease.lost.is_set() and record_end(run, lease.attempt, code) and config.tracking.enabled:
        _sync(run)
    if code == ExitCode.FINISHED:
        from pretrain.commands.report import print_report

        print_report(run, config)
    elif code == ExitCode.RESUMABLE:
        saved = CheckpointStore(run.checkpoints_path).latest()
        where = f"with {saved.name} saved" if saved else "before the first checkpoint"
        print(f"Stopped {where}. Continue with: {program()} resume {shown(run.path)}")
    return code


def program() -> str:
    """How to call this command from the present shell: by name where it is on PATH, else by its path."""
    import shutil

    return "pretrain" if shutil.which("pretrain") else shown(os.path.abspath(sys.argv[0]))


def _sync(run: RunDir) -> None:
    from pretrain.tracking.sync import sync

    try:
        sync(run.path)
    except Exception as error:  # Tracking must not hide how the run ended.
        print(f"pretrain: MLflow could not be told ({error}); later: pretrain sync {shown(run.path)}", file=sys.stderr)


def shown(path: str | os.PathLike[str]) -> str:
    """The path as a user would type it here."""
    relative = os.path.relpath(path)
    return shlex.quote(relative if not relative.startswith("..") else str(path))
