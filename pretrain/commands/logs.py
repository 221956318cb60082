"""``pretrain logs RUN``: what a run's ranks and its Slurm jobs wrote; ``-f`` follows them over restarts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.watch.summary import RunSummary

POLL_S = 0.5
STATE_POLL_S = 2.0
SLURM_POLL_S = 20.0
# A requeue passes through moments in which nobody holds the run and the queue does not have it yet.
LOST_AFTER_S = 15.0
_FOLLOW_LINES = 20
_CHUNK = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pretrain.commands.watching import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends, over restarts")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, help="only this rank's log (default: rank 0's, and its Slurm job's)")
    which.add_argument("--job", action="store_true", help="only the Slurm job's log: what the supervisor says")
    parser.add_argument("--attempt", type=int, help="a rank's log of this attempt (default: the last that has one)")
    parser.add_argument("-n", "--lines", type=int, help="only the last lines (default: all; with -f the last 20)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.commands.watching import guarded

    try:
        return guarded(lambda: _logs(arguments))
    except KeyboardInterrupt:
        return 130  # the usual way to leave `-f`


def _logs(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.watch.find import resolve_run

    path = resolve_run(arguments.run, arguments.root)
    if arguments.lines is not None and arguments.lines < 0:
        raise ValueError(f"--lines: found {arguments.lines}, expected 0 or more")
    sources = _sources(arguments)
    if arguments.follow:
        if arguments.attempt is not None:
            raise ValueError("--attempt chooses one attempt, --follow goes on to later ones; give one of the two")
        return _follow(path, sources, _FOLLOW_LINES if arguments.lines is None else arguments.lines)
    found = [files[-1] for source in sources if (files := log_files(path, source, arguments.attempt))]
    if not found:
        raise ValueError(_nothing(path, sources[-1], arguments.attempt))
    writer = _Writer(path, named=len(found) > 1)
    for file in found:
        writer.enter(file)
        with open(file, "rb") as stream:
            if arguments.lines is not None:
                stream.seek(tail_offset(file, arguments.lines))
            while data := stream.read(_CHUNK):
                writer.write(file, data)
    return ExitCode.FINISHED


def _sources(arguments: argparse.Namespace) -> list[int | None]:
    """Whose logs are wanted: ranks, and None for the supervisor."""
    if arguments.job:
        if arguments.attempt is not None:
            raise ValueError("--attempt chooses a rank's log; a job's log is of all its attempts")
        return [None]
    return [arguments.rank] if arguments.rank is not None else [0] if arguments.attempt is not None else [None, 0]


def log_files(path: Path, source: int | None, attempt: int | None = None) -> list[Path]:
    """Logs of a rank in the order of attempts; for None those of the run's Slurm jobs in theirs."""
    from launchers.watch.details import rank_logs, supervisor_logs

    if source is None:
        return supervisor_logs(path)
    return [log for number, log in rank_logs(path, source) if attempt in (None, number)]


def _nothing(path: Path, rank: int | None, attempt: int | None) -> str:
    from launchers.watch.details import known_ranks
    from launchers.watch.summary import summarise_one

    summary, _ = summarise_one(path)
    note = f" ({summary.note})" if summary.note else ""
    if rank is None:
        return f"{path}: no log of a Slurm job; the run is {summary.state}{note}. Its ranks' logs: `pretrain logs`"
    number = summary.attempt if attempt is None else attempt
    ranks = known_ranks(path, number)
    what = f"rank {rank}" + (f" in attempt {attempt}" if attempt is not None else "")
    if ranks:
        return f"{path}: no log of {what}; attempt {number} has logs of ranks {ranks[0]} to {ranks[-1]}"
    if attempt is not None and attempt != summary.attempt:
        return f"{path}: no log of {what}; the run has {summary.attempt} attempt(s)"
    return f"{path}: no log of {what} yet; the run is {summary.state}{note}. `pretrain logs -f` waits for it"


def tail_offset(path: Path, lines: int) -> int:
    """Where the last ``lines`` lines of a file begin, in bytes; reads no more of it than that takes."""
    with open(path, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        if lines <= 0:
            return end
        position, found = end, 0
        while position > 0:
            size = min(_CHUNK, position)
            position -= size
            stream.seek(position)
            data = stream.read(size)
            # A newline at the very end closes the last line, it begins none.
            at = len(data) - 1 if position + size == end and data.endswith(b"\n") else len(data)
            while (at := data.rfind(b"\n", 0, at)) >= 0:
                found += 1
                if found == lines:
                    return position + at + 1
        return 0


class Follower:
    """The bytes that appear in a growing row of log files, each read to its end before the next."""

    def __init__(self, path: Path, source: int | None, lines: int) -> None:
        self._path, self._source, self._lines = path, source, lines
        self._current: Path | None = None
        self._offset = 0

    def read(self) -> Iterator[tuple[Path, bytes]]:
        """What is new, with the file that it is from; no bytes when a file has just been entered."""
        files = log_files(self._path, self._source)
        if self._current is None:
            if not files:
                return
            self._current = files[-1]
            self._offset = tail_offset(self._current, self._lines)
            yield self._current, b""
        yield from self._new()
        later = files[files.index(self._current) + 1 :] if self._current in files else files[-1:]
        for file in later:
            yield from self._new()
            self._current, self._offset = file, 0
            yield file, b""
            yield from self._new()

    def _new(self) -> Iterator[tuple[Path, bytes]]:
        assert self._current is not None
        try:
            with open(self._current, "rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0  # emptied, as by a job whose output is not appended
                stream.seek(self._offset)
                while data := stream.read(_CHUNK):
                    self._offset += len(data)
                    yield self._current, data
        except OSError:
            return  # a file system that stalls; the next look tries again


class Watcher:
    """The state of a run, looked at seldom enough to cost nothing, and Slurm asked more seldom still."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = self._asked = float("-inf")
        self._lost_since: float | None = None
        self.summary: RunSummary | None = None

    def look(self) -> bool:
        """Looks if it is time to; whether the run has ended for good."""
        from launchers.watch.state import ACTIVE, State
        from launchers.watch.summary import summarise, summarise_one

        now = time.monotonic()
        if now - self._looked < STATE_POLL_S:
            return False
        self._looked = now
        summary = summarise(self._path)
        if summary.state not in (State.RUNNING, State.STARTING) and summary.job is not None:
            # In the queue, or gone: only Slurm knows, but it need not be asked every two seconds.
            if now - self._asked < SLURM_POLL_S and self.summary is not None and summary.state in ACTIVE | {State.LOST}:
                return False
            self._asked = now
            summary, _ = summarise_one(self._path)
        self.summary = summary
        if summary.state != State.LOST:
            self._lost_since = None
            return summary.state not in ACTIVE
        if self._lost_since is None:
            self._lost_since = now
        return now - self._lost_since >= LOST_AFTER_S


class _Writer:
    """Copies logs to standard output; where there are several, a line names the one that follows, as ``tail`` does."""

    def __init__(self, path: Path, *, named: bool) -> None:
        self._path, self._named = path, named
        self._shown: Path | None = None
        self._is_whole = True

    def enter(self, file: Path) -> None:
        """From now on ``file`` is shown."""
        if file == self._shown:
            return
        if self._named or self._shown is not None:
            break_line = b"" if self._is_whole else b"\n"
            self._put(break_line + f"==> {os.path.relpath(file, self._path)} <==\n".encode())
        self._shown = file

    def write(self, file: Path, data: bytes) -> None:
        self.enter(file)
        self._put(data)

    def _put(self, data: bytes) -> None:
        if data:
            self._is_whole = data.endswith(b"\n")
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _follow(path: Path, sources: list[int | None], lines: int) -> int:
    from launchers.exit_codes import ExitCode
    from pretrain.commands.watching import warn

    followers, watcher = [Follower(path, source, lines) for source in sources], Watcher(path)
    # A run on a workstation has no job's log, and one log needs no name.
    writer = _Writer(path, named=bool(None in sources and log_files(path, None)))
    told = ""
    while True:
        ended = watcher.look()
        for follower in followers:
            for file, data in follower.read():
                if data:
                    writer.write(file, data)
        if (summary := watcher.summary) is not None:
            words = f"{summary.name} is {summary.state}" + (f" ({summary.note})" if summary.note else "")
            if words != told and (summary.state not in ("running", "starting") or ended):
                warn(words)
            told = words
        if ended:
            return ExitCode.FINISHED
        time.sleep(POLL_S)
