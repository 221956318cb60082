"""Mixing: which source, and which of its samples, is global sample g. A pure function, in closed form.

Global sample g is position ``p = g // L`` of lane ``l = g % L``, as in :mod:`data_pipeline.order`. Each lane walks a
wheel of 4,096 slots that name sources; lane l starts l slots in, so that L consecutive samples see L consecutive
slots. A phase is a list of weights that holds from one global sample on; each phase has its own wheel, and a lane
enters it at its own first position of the phase. The number of slots of a source before any position follows from
prefix counts, so no lane needs to remember how far it has read in each source.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from data_pipeline.order import lane_positions

WHEEL_SLOTS = 4096
MIXING = "wheel-1"


@dataclass(frozen=True)
class Phase:
    """``weights`` (by source; not negative, finite, not all zero) hold from global sample ``from_sample`` on."""

    from_sample: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class MixedPlace:
    """Sample ``position`` of lane ``lane`` of source number ``source``."""

    source: int
    lane: int
    position: int


def wheel(weights: Sequence[float]) -> np.ndarray:
    """Source number of each slot (int16): every prefix of n slots holds each source n times its share, give or take
    less than one.

    The quota method (Balinski & Young 1975): a slot goes to the source that is due first among those that would not get
    ahead of their share by a whole slot. IEEE arithmetic alone, so the same on every machine.
    """
    return _wheel(tuple(float(weight) for weight in weights))


@lru_cache(maxsize=256)
def _wheel(weights: tuple[float, ...]) -> np.ndarray:
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    given = [0] * len(shares)
    result = np.empty(WHEEL_SLOTS, dtype=np.int16)
    for slot in range(WHEEL_SLOTS):
        ready = [s for s, share in enumerate(shares) if given[s] < (slot + 1) * share]
        best = min(ready, key=lambda s: ((given[s] + 1) / shares[s], s))
        result[slot] = best
        given[best] += 1
    return result


class _PhaseWheel:
    """A phase's wheel with prefix counts over two turns, from any starting slot."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.slots = wheel(weights)
        twice = np.concatenate((self.slots, self.slots))
        one_hot = twice[:, None] == np.arange(len(weights))
        self._before = np.concatenate((np.zeros((1, len(weights)), dtype=np.int64), np.cumsum(one_hot, axis=0)))
        self._columns = self._before.T.tolist()
        self._sources = self.slots.tolist()

    def source(self, lane: int, step: int) -> int:
        """Source of a lane's slot number ``step`` in this phase."""
        return self._sources[(lane + step) % WHEEL_SLOTS]

    def count_one(self, source: int, lane: int, steps: int) -> int:
        """As :meth:`count` for one lane, without arrays."""
        turns, rest = divmod(steps, WHEEL_SLOTS)
        first, before = lane % WHEEL_SLOTS, self._columns[source]
        return turns * before[WHEEL_SLOTS] + before[first + rest] - before[first]

    def count(self, source: int, lanes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Slots of ``source`` among the first ``steps`` of each of ``lanes``."""
        turns, rest = np.divmod(steps, WHEEL_SLOTS)
        first = lanes % WHEEL_SLOTS
        before = self._before[:, source]
        return turns * before[WHEEL_SLOTS] + before[first + rest] - before[first]


class Mixture:
    """The order of ``num_lanes`` run lanes over sources that have ``source_lanes`` lanes of their own.

    A source that is too small for ``num_lanes`` lanes has fewer (a divisor): run lanes l, l + L_s, l + 2 L_s ... then
    share source lane ``l % L_s`` and read it in the order of global samples.
    ``phases`` are ordered by ``from_sample``, the first at 0 (see :func:`phase_violations`).
    """

    def __init__(self, names: Sequence[str], source_lanes: Sequence[int], num_lanes: int, phases: Sequence[Phase]):
        assert all(num_lanes % lanes == 0 for lanes in source_lanes)
        assert not list(phase_violations(names, phases))
        self.num_lanes = num_lanes
        self._source_lanes = list(source_lanes)
        self._wheels = [_PhaseWheel([phase.weights.get(name, 0.0) for name in names]) for phase in phases]
        self._starts = np.stack([lane_positions(phase.from_sample, num_lanes) for phase in phases])  # [phase, lane]
        never = 1 << 62
        self._lane_starts = [[*starts, never] for starts in self._starts.T.tolist()]

    def locate(self, index: int) -> MixedPlace:
        """The place of global sample ``index``."""
        position, lane = divmod(index, self.num_lanes)
        starts = self._lane_starts[lane]
        phase = bisect_right(starts, position) - 1
        source = self._wheels[phase].source(lane, position - starts[phase])
        own = self._source_lanes[source]
        if own == self.num_lanes:
            return MixedPlace(source, lane, self._count_one(source, lane, position))
        sharing = np.arange(lane % own, self.num_lanes, own)
        # Lanes before this one have already had this position.
        steps = position + (sharing < lane)
        return MixedPlace(source, lane % own, int(self._counts(source, sharing, steps).sum()))

    def counts(self, index: int) -> list[int]:
        """Samples of each source among the first ``index`` global samples."""
        lanes = np.arange(self.num_lanes)
        steps = lane_positions(index, self.num_lanes)
        return [int(self._counts(source, lanes, steps).sum()) for source in range(len(self._source_lanes))]

    def source_positions(self, source: int, index: int) -> np.ndarray:
        """For each lane of ``source``, how many of its samples lie before global sample ``index``."""
        lanes = np.arange(self.num_lanes)
        counts = self._counts(source, lanes, lane_positions(index, self.num_lanes))
        own = self._source_lanes[source]
        return np.bincount(lanes % own, weights=counts, minlength=own).astype(np.int64)

    def _count_one(self, source: int, lane: int, steps: int) -> int:
        total = 0
        starts = self._lane_starts[lane]
        for number, phase_wheel in enumerate(self._wheels):
            if starts[number] >= steps:
                break
            total += phase_wheel.count_one(source, lane, min(starts[number + 1], steps) - starts[number])
        return total

    def _counts(self, source: int, lanes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        total = np.zeros(len(lanes), dtype=np.int64)
        for number, phase_wheel in enumerate(self._wheels):
            begins = self._starts[number, lanes]
            ends = self._starts[number + 1, lanes] if number + 1 < len(self._wheels) else steps
            inside = np.clip(np.minimum(ends, steps) - begins, 0, None)
            total += phase_wheel.count(source, lanes, inside)
        return total


def phase_violations(names: Sequence[str], phases: Sequence[Phase]) -> list[tuple[str, object, str, str]]:
    """Broken rules of ``phases`` as (field, found, rule, fix)."""
    found: list[tuple[str, object, str, str]] = []
    starts = [phase.from_sample for phase in phases]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        rule = "from_sample must be 0 in the first phase and rise from phase to phase"
        found.append(("phases", starts, rule, "order the phases by from_sample, the first at 0"))
    for number, phase in enumerate(phases):
        where = f"phases[{number}].weights"
        for name, weight in phase.weights.items():
            if name not in names:
                found.append((f"{where}.{name}", weight, "names no source", f"sources are {', '.join(names)}"))
            elif not math.isfinite(weight) or weight < 0:
                found.append((f"{where}.{name}", weight, "must be a number that is not negative", "set 0 or more"))
        if not any(math.isfinite(weight) and weight > 0 for weight in phase.weights.values()):
            found.append((where, dict(phase.weights), "at least one weight must be above 0", "give a source a weight"))
        # A source that is asked for but never comes up would be a silent loss.
        if not found:
            asked = [name for name in names if phase.weights.get(name, 0.0) > 0]
            present = set(wheel([phase.weights[name] for name in asked]).tolist())
            absent = [name for number, name in enumerate(asked) if number not in present]
            if absent:
                rule = f"gives no slot of the wheel's {WHEEL_SLOTS} to {', '.join(absent)}"
                found.append((where, dict(phase.weights), rule, "raise their weights, or set them to 0"))
        total = sum(weight for weight in phase.weights.values() if math.isfinite(weight) and weight > 0)
        for name, weight in phase.weights.items():
            if math.isfinite(weight) and 0 < weight < total / (2 * WHEEL_SLOTS):
                rule = f"is less than 1/{2 * WHEEL_SLOTS} of the sum, too little for a slot on the wheel"
                found.append((f"{where}.{name}", weight, rule, "raise it, or set it to 0"))
    return found
