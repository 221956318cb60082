"""Finds races between queues: bytes remember who touched them, vector clocks tell what came before what. Torch-free.

An access is *ordered* before another when it happened before it by the rules of queues and events alone, whatever the
speed of anything. Two accesses to one byte, at least one of them a write, that are not ordered are a race, also when
this execution happened to do them in the right order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from enum import StrEnum

Clock = dict[str, int]
"""By queue, how many of its operations are known to be over."""


def join(into: Clock, other: Clock) -> None:
    """Make ``into`` know all that ``other`` knows."""
    for queue, time in other.items():
        if into.get(queue, 0) < time:
            into[queue] = time


class Side(StrEnum):
    """Where memory lies."""

    HOST = "host"
    DEVICE = "device"


class Found(StrEnum):
    """What is wrong."""

    RACE = "race"
    UNWRITTEN = "read of memory that was never written"
    SIDE = "wrong side"
    LIMIT = "device memory exceeded"


class RaceError(RuntimeError):
    """A fault in what the devices were given to do; ``found`` is its sort."""

    def __init__(self, found: Found, message: str) -> None:
        super().__init__(f"{found}: {message}")
        self.found = found


@dataclass(frozen=True)
class Actor:
    """An operation that touches memory: ``clock`` has its own queue's time and all that is over before it."""

    name: str
    queue: str
    clock: Clock

    @property
    def time(self) -> int:
        return self.clock[self.queue]

    def after(self, other: Actor) -> bool:
        return self.clock.get(other.queue, 0) >= other.time

    def __str__(self) -> str:
        return f"{self.name} ({self.queue} queue)"


@dataclass
class _Cell:
    """Bytes with one history. ``empty``: nothing meaningful was written since the memory was handed out."""

    written: Actor | None = None
    reads: dict[str, Actor] = field(default_factory=dict)
    empty: bool = True

    def split(self) -> _Cell:
        return _Cell(self.written, dict(self.reads), self.empty)


class Region:
    """Memory of one allocation, ``num_bytes`` from ``address`` on."""

    def __init__(self, address: int, num_bytes: int, side: Side, label: str) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.side = side
        self.label = label
        self.forget()

    def forget(self) -> None:
        """Begin anew: nothing was ever done to it."""
        self._starts = [0]
        self._cells = [_Cell()]

    def read(self, actor: Actor, start: int, stop: int) -> None:
        """Raises:
        RaceError: the bytes were never written, or the write is not known to be over.
        """
        for number in self._cut(start, stop):
            cell = self._cells[number]
            self._check(cell.written, actor, "reads", "wrote", number)
            if cell.empty:
                raise RaceError(Found.UNWRITTEN, f"{actor} reads {self._bytes(number)} of {self.label}")
            cell.reads[actor.queue] = actor

    def write(self, actor: Actor, start: int, stop: int, *, empty: bool = False) -> None:
        """``empty``: the memory's user changes, its values mean nothing from now on.

        Raises:
            RaceError: a write or read of the bytes is not known to be over.
        """
        for number in self._cut(start, stop):
            cell = self._cells[number]
            self._check(cell.written, actor, "writes", "wrote", number)
            for reader in cell.reads.values():
                self._check(reader, actor, "writes", "read", number)
            self._cells[number] = _Cell(actor, {}, empty)

    def _check(self, before: Actor | None, actor: Actor, does: str, did: str, number: int) -> None:
        if before is not None and not actor.after(before):
            raise RaceError(
                Found.RACE,
                f"{actor} {does} {self._bytes(number)} of {self.label}, which {before} {did}; nothing orders the two",
            )

    def _bytes(self, number: int) -> str:
        stop = self._starts[number + 1] if number + 1 < len(self._starts) else self.num_bytes
        return f"bytes {self._starts[number]}..{stop}"

    def _cut(self, start: int, stop: int) -> range:
        """Numbers of the cells that are ``[start, stop)``, cut where needed."""
        if start >= stop:
            return range(0)
        for at in (start, stop):
            found = bisect_right(self._starts, at) - 1
            if self._starts[found] != at and at < self.num_bytes:
                self._starts.insert(found + 1, at)
                self._cells.insert(found + 1, self._cells[found].split())
        return range(bisect_left(self._starts, start), bisect_left(self._starts, stop))


class Regions:
    """All memory that is watched, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def add(self, region: Region) -> None:
        at = bisect_left(self._starts, region.address)
        self._starts.insert(at, region.address)
        self._regions.insert(at, region)

    def find(self, address: int) -> Region | None:
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        region = self._regions[at]
        return region if address < region.address + region.num_bytes else None
