"""From exceptions to exit codes: the one table for ranks and commands. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Callable

from launchers.exit_codes import ExitCode
from launchers.lease import FencedError
from launchers.run_dir import RunDirectoryError
from pretrain.checkpoint.manifest import CorruptCheckpointError
from pretrain.config.violation import InvalidConfigError


def exit_code_of(error: BaseException) -> ExitCode:
    """Exit code for a failure; ``ValueError`` is by convention the user's to mend."""
    if isinstance(error, CorruptCheckpointError):
        return ExitCode.CORRUPTED_CHECKPOINT
    # A lease that is lost during a save arrives as the cause of the failed save.
    if isinstance(error, RunDirectoryError | FencedError) or isinstance(error.__cause__, FencedError):
        return ExitCode.RUN_DIRECTORY_REFUSED
    if isinstance(error, ValueError):
        return ExitCode.INVALID_INPUT
    return ExitCode.FAILED


def guarded(action: Callable[[], int]) -> int:
    """Run a command; a failure that its user can mend is printed without a trace and becomes its exit code."""
    try:
        return action()
    except (ValueError, FencedError) as error:
        prefix = "" if isinstance(error, InvalidConfigError) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        return exit_code_of(error)
