"""What several fetch tests share."""

from __future__ import annotations

import contextlib
import fcntl
import random
from collections.abc import Callable
from pathlib import Path

import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange

DATA = random.Random(7).randbytes(100_000)


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class MemoryStorage:
    """Files in memory; lists what was read. ``before`` is called first in every read."""

    def __init__(self, files: dict[str, bytes], before: Callable[[ByteRange], None] = lambda wanted: None) -> None:
        self.url = "memory"
        self.files, self.before = files, before
        self.reads: list[ByteRange] = []

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        stop = len(self.files[name]) if length is None else start + length
        wanted = ByteRange(name, start, stop)
        self.reads.append(wanted)
        self.before(wanted)
        return self.files[name][start:stop]

    def size(self, name: str) -> int:
        return len(self.files[name])

    def close(self) -> None: ...


def ranges(name: str, length: int, count: int) -> list[ByteRange]:
    """The first ``count`` ranges of ``length`` bytes."""
    return [ByteRange(name, i * length, (i + 1) * length) for i in range(count)]


def cut(wanted: ByteRange, data: bytes = DATA) -> bytes:
    return data[wanted.start : wanted.stop]


class Verifier:
    """Compares with hashes of the true bytes, as sidecars hold them."""

    def __init__(self, data: bytes = DATA) -> None:
        self._data = data
        self.calls: list[ByteRange] = []

    def __call__(self, wanted: ByteRange, data: bytes) -> None:
        self.calls.append(wanted)
        if xxhash.xxh3_64_digest(data) != xxhash.xxh3_64_digest(cut(wanted, self._data)):
            raise DamagedDataError(f"{wanted.name}: byte {wanted.start}: wrong hash", shard=wanted.name)


def used_bytes(folder: Path) -> int:
    """Bytes of all entries and parts of a cache folder."""
    total = 0
    for path in (folder / "segments-1" / "entries").iterdir():
        with contextlib.suppress(FileNotFoundError):  # threads may be at work
            total += path.stat().st_size
    return total


def used_at_one_moment(folder: Path) -> int:
    """The same while nobody makes room."""
    with open(folder / "segments-1" / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return used_bytes(folder)
