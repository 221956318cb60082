"""What has been done so far: counters that flow from where the work is done to what shows them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.prepare.records import Dropped

_EXAMPLES_PER_REASON = 5
_MOST_EXAMPLES = 100


@dataclass
class Counts:
    """``read`` bytes of input (as they lie in the files); ``documents`` kept, their ``bytes`` of UTF-8 and
    ``tokens`` with frames; ``written`` tokens in finished shards; ``dropped`` documents by reason."""

    read: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add ``other`` to this."""
        self.read += other.read
        self.documents += other.documents
        self.bytes += other.bytes
        self.tokens += other.tokens
        self.written += other.written
        self.dropped.update(other.dropped)


@dataclass(frozen=True)
class Status:
    """One look at a running preparation: ``done`` of ``total`` ``unit`` of this ``phase`` (what an earlier run
    left included), ``counts`` and ``seconds`` of this run and phase alone, and its ``share`` of the total."""

    phase: str
    done: int
    total: int
    unit: str
    counts: Counts
    seconds: float
    earlier: int = 0

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the mean speed of this run; None before anything is done."""
        gained = self.done - self.earlier
        return (self.total - self.done) * self.seconds / gained if gained > 0 else None


Progress = Callable[[Status], None]


class Meter:
    """Counts within one process and passes them on at most every ``interval`` seconds."""

    def __init__(self, send: Callable[[Counts], None], interval: float = 0.25) -> None:
        self._send, self._interval = send, interval
        self._counts = Counts()
        self._sent = time.monotonic()

    def add(self, counts: Counts) -> None:
        """Count, and pass on what has come together."""
        self._counts.add(counts)
        if time.monotonic() - self._sent >= self._interval:
            self.flush()

    def read(self, num_bytes: int) -> None:
        """Count bytes of input."""
        self._counts.read += num_bytes

    def flush(self) -> None:
        """Pass on everything now."""
        self._send(self._counts)
        self._counts = Counts()
        self._sent = time.monotonic()


class Drops:
    """Documents left out: how many by reason, and the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: list[dict[str, str]] = []
        self._listed: Counter[str] = Counter()

    def add(self, dropped: Dropped) -> None:
        """Count one."""
        self.counts[dropped.reason] += 1
        self._list(dropped.reason, dropped.path, dropped.why)

    def merge(self, tree: dict[str, Any]) -> None:
        """Add what :meth:`to_json` of another gave."""
        self.counts.update(tree["counts"])
        for example in tree["examples"]:
            self._list(example["why"].split(":")[0], example["path"], example["why"])

    def to_json(self) -> dict[str, Any]:
        """``counts`` by reason and ``examples``, each a path and why."""
        return {"counts": dict(sorted(self.counts.items())), "examples": self._examples}

    def _list(self, reason: str, path: str, why: str) -> None:
        if self._listed[reason] < _EXAMPLES_PER_REASON and len(self._examples) < _MOST_EXAMPLES:
            self._listed[reason] += 1
            self._examples.append({"path": path, "why": why})

    @classmethod
    def merged(cls, trees: Iterable[dict[str, Any]]) -> Drops:
        """All of ``trees`` in order."""
        drops = cls()
        for tree in trees:
            drops.merge(tree)
        return drops
