"""Runs that verification starts: the user's own commands in processes of their own, one of them killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil

from launchers.exit_codes import from_returncode, meaning

_POLL_S = 0.005  # short beside a step, so that a kill comes close to the step that it waits for
_DEATH_S = 60.0


class RunFailedError(RuntimeError):
    """A run that verification needs ended otherwise than expected. ``code`` is its exit code."""

    def __init__(self, title: str, code: int, log: Path) -> None:
        self.code = code
        self.reason = _last_lines(log)
        super().__init__(
            f"{title} ended with code {code} ({meaning(code)}). Its last lines:\n{self.reason}\nLog: {log}"
        )


def finish(title: str, log: Path, arguments: Sequence[str | Path]) -> float:
    """Run ``pretrain ARGUMENTS`` to its end, its output in ``log``; returns the seconds it took.

    Raises:
        RunFailedError: it ended with another code than 0.
    """
    started = time.perf_counter()
    with _started(log, arguments) as process:
        code = from_returncode(process.wait())
    if code:
        raise RunFailedError(title, code, log)
    return time.perf_counter() - started


def kill_when(title: str, log: Path, arguments: Sequence[str | Path], due: Callable[[], bool]) -> tuple[float, int]:
    """Run ``pretrain ARGUMENTS`` until ``due``, then SIGKILL the command and all its ranks.

    Returns the seconds it took and the number of processes killed, all of which are dead by then.

    Raises:
        RunFailedError: it failed by itself before that.
        ValueError: it finished before that.
    """
    started = time.perf_counter()
    with _started(log, arguments) as process:
        while not due():
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = from_returncode(process.wait(_POLL_S))
                if code:
                    raise RunFailedError(title, code, log)
                raise ValueError(f"{title} finished before it could be killed; give more --steps")
        killed = _kill(process)
    return time.perf_counter() - started, killed


@contextlib.contextmanager
def _started(log: Path, arguments: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    """The command in its own process; whatever happens, nothing of it is left running."""
    stream: IO[bytes]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL for the command, then its ranks (which are sessions of their own); returns once all are dead."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    deadline = time.monotonic() + _DEATH_S
    while any(map(_is_alive, family)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {[p.pid for p in family if _is_alive(p)]} outlive SIGKILL")
        time.sleep(_POLL_S)
    return len(family)


def _is_alive(process: psutil.Process) -> bool:
    try:
        # A zombie holds nothing any more; in a container nobody may ever collect it.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _last_lines(log: Path, count: int = 15) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-count:]
    return "\n".join(f"  | {line}" for line in lines)


class StepWatch:
    """Follows growing trace files; :meth:`reached` reads only what is new."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._offsets = dict.fromkeys(files, 0)
        self._lines = dict.fromkeys(files, 0)

    def reached(self, step: int) -> bool:
        """Whether every rank of a run that began at step 0 has recorded ``step``."""
        for path in self._offsets:
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
                stream.seek(self._offsets[path])
                new = stream.read()
                self._offsets[path] += len(new)
                self._lines[path] += new.count(b"\n")
        # One line tells the state at the start.
        return min(self._lines.values()) > step
