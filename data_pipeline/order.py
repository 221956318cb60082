"""Which row of which segment is global sample g: a pure function of (seed, plan, number of lanes).

Global sample g is position ``g // L`` of lane ``g % L``. In epoch e the segments are permuted by a key of
(seed, split, e); lane l takes every L-th of them starting at ``(l + e) % L``, so that when L does not divide
the number of segments every lane takes its turn at the longer share. A lane rolls into its next epoch on its
own: no padding, no epoch barrier.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from data_pipeline.keyed import keyed_permutation

_KEPT_PERMUTATIONS = 4


@dataclass(frozen=True)
class Place:
    """Row ``row`` of segment ``segment`` in epoch ``epoch``, read by lane ``lane``."""

    lane: int
    epoch: int
    segment: int
    row: int


@dataclass
class _LaneEpoch:
    """What one lane reads in one epoch: its first position, its segments and where each begins."""

    epoch: int
    start: int
    segments: list[int]
    bounds: list[int]


class LaneOrder:
    """Endless shuffled order over segments with ``rows_per_segment`` rows, in ``num_lanes`` lanes.

    Raises ValueError when there are more lanes than segments.
    """

    def __init__(self, rows_per_segment: np.ndarray, num_lanes: int, seed: int, split: str) -> None:
        if not 1 <= num_lanes <= len(rows_per_segment):
            raise ValueError(
                f"num_lanes is {num_lanes}, but must lie between 1 and the {len(rows_per_segment)} segments "
                f"of split {split!r}. What to do: lower num_lanes, or leave it out."
            )
        self.num_lanes = num_lanes
        self._rows = rows_per_segment
        self._key = (seed, split)
        self._permutations: dict[int, np.ndarray] = {}
        self._epoch_starts = [np.zeros(num_lanes, dtype=np.int64)]  # [epoch][lane]: first position
        self._current: dict[int, _LaneEpoch] = {}

    def locate(self, index: int) -> Place:
        """The place of global sample ``index``. O(log) per call; a jump forward first counts the epochs it
        passes."""
        position, lane = divmod(index, self.num_lanes)
        current = self._current.get(lane)
        if current is None or not 0 <= position - current.start < current.bounds[-1]:
            current = self._current[lane] = self._find(lane, position)
        offset = position - current.start
        at = bisect_right(current.bounds, offset) - 1
        return Place(lane, current.epoch, current.segments[at], offset - current.bounds[at])

    def segment_key(self, place: Place) -> tuple[object, ...]:
        """Key of every draw inside one visit of a segment."""
        return (*self._key, place.epoch, place.segment)

    def _find(self, lane: int, position: int) -> _LaneEpoch:
        while self._epoch_starts[-1][lane] <= position:
            self._count_epoch(len(self._epoch_starts) - 1)
        epoch = bisect_right(self._epoch_starts, position, key=lambda starts: int(starts[lane])) - 1
        segments = self._lane_segments(epoch, lane)
        bounds = [0, *np.cumsum(self._rows[segments]).tolist()]
        return _LaneEpoch(epoch, int(self._epoch_starts[epoch][lane]), segments.tolist(), bounds)

    def _count_epoch(self, epoch: int) -> None:
        rows = [int(self._rows[self._lane_segments(epoch, lane)].sum()) for lane in range(self.num_lanes)]
        self._epoch_starts.append(self._epoch_starts[-1] + np.array(rows))

    def _lane_segments(self, epoch: int, lane: int) -> np.ndarray:
        return self._permutation(epoch)[(lane + epoch) % self.num_lanes :: self.num_lanes]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) >= _KEPT_PERMUTATIONS:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = keyed_permutation(len(self._rows), *self._key, epoch)
        return self._permutations[epoch]


class SequentialOrder:
    """Every row once, in stored order: one lane, one epoch."""

    num_lanes = 1

    def __init__(self, rows_per_segment: np.ndarray) -> None:
        self._bounds = np.concatenate(([0], np.cumsum(rows_per_segment)))

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return int(self._bounds[-1])

    def locate(self, index: int) -> Place:
        """The place of row ``index``; raises IndexError outside ``range(num_samples)``."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is outside the {self.num_samples} samples of this source")
        segment = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return Place(0, 0, segment, int(index - self._bounds[segment]))
