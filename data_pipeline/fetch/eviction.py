"""What leaves a full cache: a pure function of the entries and of the known plans.

The plan of every process is known for some way ahead, so the entry needed last goes first (Belady's rule, over the
processes of a node: an entry's distance is the least of any plan). Beyond the plans an epoch decides: what was read
just now comes again only in the next epoch, later than what has not been read in this one. So among entries without a
known need the latest read goes first; the usual rule, least recently used, would find nothing again in a data set
larger than the cache. Only entries of data sets that no process reads any more go by age.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A file of the cache: ``dataset`` and ``key`` name it; ``size`` in bytes; ``used_ns``: when it was last read."""

    dataset: str
    key: str
    size: int
    used_ns: int


@dataclass(frozen=True)
class Needs:
    """``distances``: reads until a key is needed, for the known plans; ``live``: data sets that are being read."""

    distances: Mapping[str, int]
    live: frozenset[str]

    def order(self, entry: Entry) -> tuple[int, float, str]:
        """Sort key: what sorts first is evicted first."""
        if entry.key in self.distances:
            return (2, -self.distances[entry.key], entry.key)
        if entry.dataset in self.live:
            return (1, -entry.used_ns, entry.key)
        return (0, entry.used_ns, entry.key)

    def order_of_new(self, key: str) -> tuple[int, float, str]:
        """Sort key of an entry that is about to be written: what does not sort before it stays."""
        if key in self.distances:
            return (2, -self.distances[key], "")
        return (1, -math.inf, "")


def choose_victims(entries: Iterable[Entry], needs: Needs, key: str, required: int, slack: int = 0) -> list[Entry]:
    """Entries to remove so that ``required`` bytes become free for the new entry ``key``; fewer bytes when only entries
    that are needed sooner than ``key`` remain.

    Up to ``slack`` bytes more are freed where no need is known, so that a full cache is not searched for every entry.
    """
    limit = needs.order_of_new(key)
    victims: list[Entry] = []
    freed = 0
    for order, entry in sorted(((needs.order(entry), entry) for entry in entries), key=lambda pair: pair[0]):
        if order >= limit:
            break
        known = order[0] == 2
        if freed >= required and (known or freed + entry.size > required + slack):
            break
        victims.append(entry)
        freed += entry.size
    return victims
