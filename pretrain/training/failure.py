"""From exceptions to exit codes: the one table for ranks and commands. Torch-free."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import DamagedDataError, FetchError
from launchers.exit_codes import ExitCode
from launchers.lease import FencedError
from launchers.run_dir import RunDir, RunDirectoryError
from pretrain.checkpoint.manifest import CheckpointSaveError, CorruptCheckpointError
from pretrain.config.files import NO_ROOM, way_out
from pretrain.config.violation import InvalidConfigError

# Torch tells by words what it has no class for. Each is of its source: allocators, CUDA's, NCCL's and gloo's messages.
_DEVICE_MEMORY = re.compile(
    r"(CUDA|HIP|XPU) out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
_HOST_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't|not enough)|[Cc]annot allocate memory|std::bad_alloc|unable to mmap \d+ bytes"
)
_DEVICE_FAULT = re.compile(
    r"uncorrectable (NVLink|ECC)|ECC error|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device"
    r"|GPU is lost|fallen off the bus|hardware error|CUDA error: (unknown error|unspecified launch failure)"
    r"|CUDA error: (device not ready|system not yet initialized|the launch timed out and was terminated)"
    r"|ncclUnhandledCudaError|unhandled cuda error"
)
_LOST_PEER = re.compile(
    r"[Cc]onnection (was )?(closed|reset)( by (remote )?peer)?|[Bb]roken pipe|ncclRemoteError|communicator was aborted"
    r"|remote process exited|timeout caused pair closure|Timed out waiting \d+ms|Watchdog caught collective"
    r"|[Cc]lient socket has (timed out|failed)|recvValue failed|failed to recv|Connection refused|NCCL timeout"
)


_NO_ROOM_ELSEWHERE = re.compile(rf"\[Errno ({'|'.join(map(str, NO_ROOM))})\]")


def exit_code_of(error: BaseException) -> ExitCode:
    """Exit code for a failure; ``ValueError`` is by convention the user's to mend.

    An exception class may name its code itself, as its attribute ``exit_code``.
    """
    declared = getattr(type(error), "exit_code", None)
    if isinstance(declared, ExitCode):
        return declared
    if isinstance(error, CorruptCheckpointError):
        return ExitCode.CORRUPTED_CHECKPOINT
    # A lease that is lost during a save arrives as the cause of the failed save.
    if isinstance(error, RunDirectoryError | FencedError) or isinstance(error.__cause__, FencedError):
        return ExitCode.RUN_DIRECTORY_REFUSED
    if isinstance(error, DamagedDataError | FetchError):
        return ExitCode.DATA_FAULT
    if _finds_no_room(error):
        return ExitCode.RUN_DIRECTORY_REFUSED
    if isinstance(error, ValueError):
        return ExitCode.INVALID_INPUT
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded here
        return ExitCode.DEVICE_MEMORY
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return ExitCode.HOST_MEMORY
    if isinstance(error, RuntimeError):
        for pattern, code in (
            (_DEVICE_MEMORY, ExitCode.DEVICE_MEMORY),
            (_HOST_MEMORY, ExitCode.HOST_MEMORY),
            (_DEVICE_FAULT, ExitCode.NODE_FAULT),
        ):
            if pattern.search(str(error)):
                return code
    return ExitCode.FAILED


def _finds_no_room(error: BaseException) -> bool:
    """Whether a disk takes no more files, of this rank or of one that a checkpoint was to be saved with."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            return True
        if isinstance(seen, CheckpointSaveError) and _NO_ROOM_ELSEWHERE.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def lost_peer(error: BaseException) -> bool:
    """Whether a rank failed because another one was gone: then the cause lies elsewhere."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError | OSError) and _LOST_PEER.search(str(seen)):
            return exit_code_of(error) == ExitCode.FAILED
        seen = seen.__cause__
    return False


def record_end_of_rank(path: Path, code: int, error: BaseException | None = None) -> None:
    """Leaves this rank's account of its end in the run directory at ``path``, for the supervisor. Never raises.

    Nothing is written by a process that is no rank of an attempt.
    """
    from launchers.lifecycle.end_record import write_end_record
    from launchers.lifecycle.exit_class import class_of_code

    rank, attempt = os.environ.get("SLURM_PROCID", ""), os.environ.get("PRETRAIN_ATTEMPT", "")
    if not (rank.isdigit() and attempt.isdigit()):
        return
    run = RunDir(path.absolute())
    if not run.attempt_path(int(attempt)).is_dir():
        return
    message = "" if error is None else f"{type(error).__name__}: {error}"
    consequence = error is not None and lost_peer(error)
    write_end_record(run, int(attempt), int(rank), int(code), class_of_code(code), message, consequence=consequence)


def guarded(action: Callable[[], int]) -> int:
    """Run a command; a failure that its user can mend is printed without a trace and becomes its exit code."""
    try:
        return action()
    except (ValueError, FencedError) as error:
        prefix = "" if isinstance(error, InvalidConfigError) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        return exit_code_of(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what = f"{error.filename or 'a file'}: {error.strerror}"
        print(f"error: {what}; {way_out(error)}, then try again", file=sys.stderr)
        return ExitCode.FAILED
