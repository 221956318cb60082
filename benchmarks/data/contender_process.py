"""A contender's process, seen from the benchmark: it runs only during its turns.

Contenders of one table are opened one after another and then take turns, so that a slow minute of the machine hits all
of them. Between turns the whole process group is stopped (SIGSTOP), for some keep polling or prefetching in the
background and would take the processor from the one whose turn it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_GRACE = 3.0
_MEASURE = Path(__file__).with_name("measure.py")


class ContenderError(RuntimeError):
    """A contender's process failed; the message has the end of its log."""


class ContenderProcess:
    """One running ``measure.py``. ``opened`` holds its first answer."""

    def __init__(self, python: Path, arguments: list[str], log: Path, timeout: float) -> None:
        self._log, self._timeout = log, timeout
        self._buffer = b""
        temporary = log.with_name("tmp")  # some leave lock files behind
        temporary.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(
                [str(python), str(_MEASURE), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                start_new_session=True,  # one group with its workers, to stop and end them together
            )
        try:
            self.opened = self._answer()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> dict[str, Any]:
        """Let it run for ``seconds``; its answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """Let it end by itself, then end what is left of the group."""
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
            # Python's resource tracker, in the same group, now removes semaphores that were left behind.
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContenderError(f"no answer within {self._timeout:.0f} s. {self._tail()}")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise ContenderError(f"its process ended with code {self._process.wait()}. {self._tail()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return "Its last words: " + (lines[-1] if lines else "(none)") + f" (log: {self._log})"
