"""Runs between fork and the rank's program: ties the rank's life to its launcher's, then becomes the program.

Started as ``python -I -S rank_shim.py LAUNCHER_PID program argument...``. A separate program, because code
that runs between fork and exec inside a launcher with threads may deadlock; the kernel keeps the setting
across exec.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:
        sys.exit(128 + signal.SIGKILL)  # The launcher died before the tie held.
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
