"""What is measured of a step: times on the model's own stream, copies over the link, peaks of memory."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

Mark = Any
"""A host time in seconds, or an event of CUDA."""


class Laps:
    """Marks at the beginning of each step and at the end of its phases; nothing waits until :meth:`milliseconds`.

    On CUDA a mark is an event on the model's stream. An arm that lets the model's next operations wait for its update
    puts that wait on this stream, so the mark after the update is the moment at which the next forward pass may start.
    On a host without a GPU a mark is wall time.
    """

    PHASES = ("forward", "backward", "update")

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[tuple[Mark, list[tuple[str, Mark]]]] = []
        self._told: dict[int, dict[str, float]] = {}

    def begin(self) -> None:
        self._steps.append((self._now(), []))

    def lap(self, phase: str) -> None:
        self._steps[-1][1].append((phase, self._now()))

    def told(self, phases: dict[str, float]) -> None:
        """Phases of this step in milliseconds, of one that takes its own times."""
        self._told[len(self._steps) - 1] = phases

    def milliseconds(self) -> dict[str, list[float]]:
        """By phase a value of each step; ``iteration``: from the beginning of a step to that of the next one, so of all
        but the last."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {phase: [] for phase in self.PHASES}
        for number, (first, laps) in enumerate(self._steps):
            sums = dict.fromkeys(self.PHASES, 0.0) | self._told.get(number, {})
            before = first
            for phase, mark in laps:
                sums[phase] += self._between(before, mark)
                before = mark
            for phase, value in sums.items():
                found[phase].append(value)
        starts = [first for first, _ in self._steps]
        found["iteration"] = [self._between(a, b) for a, b in pairwise(starts)]
        return found

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Mark, second: Mark) -> float:
        if self._cuda:
            return float(first.elapsed_time(second))
        return (second - first) * 1e3


def traced_copies(step: Callable[[], object]) -> dict[str, Any] | None:
    """Copies between host and device in one run of ``step``, as the profiler sees them; None where it sees none.

    Times under the profiler are not those of the table: of this only bytes and rates of single copies are taken.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = copies_of_trace(events)
    return found if any(side["bytes"] for side in found.values()) else None


def copies_of_trace(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of a Chrome trace of Kineto: by direction (``up``: host to device, ``down``) bytes, seconds in which at least one
    copy ran, and GB/s in that time."""
    spans: dict[str, list[tuple[float, float]]] = {"up": [], "down": []}
    sizes = dict.fromkeys(spans, 0)
    for event in events:
        if event.get("cat") != "gpu_memcpy":
            continue
        name = event.get("name", "")
        side = "up" if "HtoD" in name else "down" if "DtoH" in name else None
        if side is not None:
            spans[side].append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
            sizes[side] += int(event.get("args", {}).get("bytes", 0))
    found = {}
    for side, pieces in spans.items():
        busy = covered(pieces) * 1e-6
        found[side] = {"bytes": sizes[side], "busy_s": busy, "gb_per_s": sizes[side] / busy / 1e9 if busy else 0.0}
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(spans):
        if high > end:
            total += high - max(low, end)
            end = high
    return total


def own_peak_host_bytes() -> int:
    """Most memory that this process had resident; memory that the driver pins may not count in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
