"""Which nodes a run is kept away from: a pure function of its journal. Torch-free."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from launchers.lifecycle import journal

EXCLUSION_S = 24 * 3600.0
"""For so long a node is left out after it was at fault."""


def exclusions(history: Sequence[journal.Entry], now: float) -> dict[str, float]:
    """Nodes that this run has been moved away from, since its user last started it by hand, and when (unix seconds).

    Those that are a day old at ``now`` are over; what the user asked for stays.
    """
    nodes: dict[str, float] = {}
    for entry in history:
        names, at = entry.get("exclude") or (), float(entry.get("time", now))
        if entry["event"] == "submitted" and entry.get("kind") != "chain":
            nodes = dict.fromkeys(names, math.inf)
        elif entry["event"] == "attempt_ended":
            nodes |= {name: max(at, nodes.get(name, at)) for name in names}
        elif entry["event"] in ("requeued", "submitted"):  # which carry on what ends of attempts have said
            nodes = dict.fromkeys(names, at) | nodes
        elif entry["event"] == "exclusion_lifted":
            nodes = {name: since for name, since in nodes.items() if name not in entry["nodes"]}
    return {name: since for name, since in nodes.items() if now - since < EXCLUSION_S}


def excluded_nodes(history: Sequence[journal.Entry]) -> frozenset[str]:
    """Nodes that this run is kept away from now (see :func:`exclusions`)."""
    return frozenset(exclusions(history, time.time()))
