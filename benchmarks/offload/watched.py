"""A process with a limit of time and of host memory, and the most memory that it took. Torch-free."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil

_LOOK_SECONDS = 0.1


class Watched:
    """``process`` leads a process group of its own, which is ended with it.

    ``peak_bytes``: the larger of what the process and its children had resident together and, where there is a GPU, of
    the fall of the host's available memory: not every driver counts memory that it pins as resident.
    """

    OVER_TIME = "over time"
    OVER_MEMORY = "over memory"

    def __init__(self, process: subprocess.Popen[bytes], seconds: float, limit_bytes: float | None) -> None:
        self._process, self._seconds, self._limit = process, seconds, limit_bytes
        self._available = psutil.virtual_memory().available
        self._counts_fall = os.path.exists("/proc/driver/nvidia/version")
        self.peak_bytes = 0

    def wait(self) -> str | None:
        """Until it ends by itself (None), or was ended, and why."""
        started = time.monotonic()
        why = None
        try:
            while self._process.poll() is None and why is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LOOK_SECONDS)
                self.peak_bytes = max(self.peak_bytes, self._taken())
                if time.monotonic() - started > self._seconds:
                    why = self.OVER_TIME
                elif self._limit is not None and self.peak_bytes > self._limit:
                    why = self.OVER_MEMORY
            return why if self._process.poll() is None else None
        finally:
            # Also what it left behind: workers that outlive it hold memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _taken(self) -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(self._process.pid)
            for process in (leader, *leader.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        fall = self._available - psutil.virtual_memory().available if self._counts_fall else 0
        return max(total, fall)
