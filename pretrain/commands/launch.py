"""Starting a run on this machine: supervision, progress, summary. Shared by ``run`` and ``resume``."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.lease import Lease
    from pretrain.config.schema import Config


def launch_attempt(lease: Lease, config: Config, checkpoint: str | None = None) -> int:
    """Launch the ranks of the attempt that ``lease`` holds, see to them until the run is over here.

    Attempts follow by themselves as the configuration has it. Prints the summary of a finished run; returns the ranks'
    exit code.
    """
    from launchers.exit_codes import ExitCode
    from launchers.lifecycle import cancellation
    from launchers.lifecycle.supervise import Supervisor, default_program
    from launchers.local import LocalBackend
    from launchers.outcome import tell_tracker
    from launchers.progress import open_display
    from pretrain.checkpoint.store import CheckpointStore

    run = lease.run
    cancellation.withdraw(run)  # a wish of before; whoever starts the run wants it
    print(f"run directory {shown(run.path)} (attempt {lease.attempt})", flush=True)
    outcome = Supervisor(
        run,
        LocalBackend(),
        lease,
        config,
        program=default_program(run),
        command=["pretrain", *sys.argv[1:]],
        first_arguments=[] if checkpoint is None else ["--checkpoint", checkpoint],
        open_display=open_display,
        between_attempts=lambda: tell_tracker(run),
    ).supervise()
    if not outcome.fenced:
        tell_tracker(run)
    if outcome.code == ExitCode.FINISHED:
        from pretrain.commands.report import print_report

        print_report(run, config)
    elif outcome.code == ExitCode.RESUMABLE:
        saved = CheckpointStore(run.checkpoints_path).latest()
        where = f"with {saved.name} saved" if saved else "before the first checkpoint"
        print(f"Stopped {where}. Continue with: {program()} resume {shown(run.path)}")
    return outcome.code


def program() -> str:
    """How to call this command from the present shell: by name where it is on PATH, else by its path."""
    import shutil

    return "pretrain" if shutil.which("pretrain") else shown(os.path.abspath(sys.argv[0]))


def shown(path: str | os.PathLike[str]) -> str:
    """The path as a user would type it here."""
    relative = os.path.relpath(path)
    return shlex.quote(relative if not relative.startswith("..") else str(path))
