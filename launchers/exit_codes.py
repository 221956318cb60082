"""Exit codes of ranks and launchers: what a shell, a Slurm script or a supervisor may rely on."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of this platform ended. A launcher returns its ranks' code unchanged.

    ``RESUMABLE`` is 85 because sites commonly list that code in Slurm's ``RequeueExit``.
    """

    FINISHED = 0
    FAILED = 1
    INVALID_INPUT = 2
    RUN_DIRECTORY_REFUSED = 3
    CORRUPTED_CHECKPOINT = 4
    NONFINITE = 5
    DATA_FAULT = 6
    DEVICE_MEMORY = 7
    HOST_MEMORY = 8
    NODE_FAULT = 9
    RESUMABLE = 85


_MEANINGS = {
    ExitCode.FINISHED: "finished",
    ExitCode.FAILED: "unexpected failure",
    ExitCode.INVALID_INPUT: "invalid configuration or input",
    ExitCode.RUN_DIRECTORY_REFUSED: "run directory refused (other configuration, another writer, or a full disk)",
    ExitCode.CORRUPTED_CHECKPOINT: "corrupted checkpoint",
    ExitCode.NONFINITE: "bad numbers: loss or gradient is not finite, or the loss spiked",
    ExitCode.DATA_FAULT: "damaged or unreachable data",
    ExitCode.DEVICE_MEMORY: "out of device memory",
    ExitCode.HOST_MEMORY: "out of host memory",
    ExitCode.NODE_FAULT: "a device or the node's communication failed",
    ExitCode.RESUMABLE: "interrupted, saved, resumable",
}


def meaning(code: int) -> str:
    """Words for a process's exit code; codes above 128 are deaths by signal ``code - 128``, as in a shell."""
    if code in _MEANINGS:
        return _MEANINGS[ExitCode(code)]
    if code > 128:
        import signal

        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:
            return f"killed by signal {code - 128}"
    return f"exit code {code}"


def from_returncode(returncode: int) -> int:
    """``subprocess`` return code -> exit code: death by signal n (negative) becomes 128 + n."""
    return 128 - returncode if returncode < 0 else returncode
