"""Counters that many threads add to: what was asked, moved, repeated and waited for."""

from __future__ import annotations

import threading


class Counters:
    """Named sums. Names are fixed at construction, so that a log has the same columns from the first line on."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = dict.fromkeys(names, 0)

    def add(self, name: str, amount: float = 1) -> None:
        """Add ``amount`` to ``name``."""
        with self._lock:
            self._values[name] += amount

    def as_dict(self) -> dict[str, float]:
        """A copy of all sums."""
        with self._lock:
            return dict(self._values)

    def after_fork(self) -> None:
        """A child starts with a lock of its own; the parent's may have been held when it was copied."""
        self._lock = threading.Lock()


def fetch_counters() -> Counters:
    """Counters of a storage; ``seconds`` sums over requests that overlap."""
    return Counters("requests", "bytes", "retries", "seconds", "ignored_ranges")
