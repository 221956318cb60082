"""Which row of which segment is global sample g: a pure function of (seed, plan, number of lanes).

Global sample g is position ``g // L`` of lane ``g % L``. For L epochs at a time (a *round*) the segments are dealt into
L groups by a key of (seed, split, round). In epoch j of a round lane l reads group ``(l + j) % L``, in an order that a
key of the epoch gives. So every epoch holds each segment once; a lane rolls into its next epoch on its own (no padding,
no epoch barrier); and after a round every lane has read every segment once, which puts all lanes at the same position:
the place of any sample is found without walking through the epochs before it.

Segments that are added later (see :class:`Addition`) join the epoch that is under way at a declared sample. Each
epoch still holds every segment that belongs to it exactly once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.keyed import keyed_permutation

_KEPT_ROUNDS = 4


@dataclass(frozen=True)
class Place:
    """Row ``row`` of segment ``segment`` in epoch ``epoch``, read by lane ``lane``."""

    lane: int
    epoch: int
    segment: int
    row: int


def lane_positions(sample: int, num_lanes: int) -> np.ndarray:
    """First position of each lane that lies at or after global sample ``sample``."""
    return np.maximum(0, -(-(sample - np.arange(num_lanes)) // num_lanes))


@dataclass(frozen=True)
class Addition:
    """From position ``positions[lane]`` of each lane on, the order holds the first ``num_segments`` segments.

    The switch happens in one epoch E for all lanes: the latest that any lane has reached at its position. A lane that
    is inside E finishes the segment it reads, then walks what it has left of E together with its share of the new
    segments, shuffled; a lane that is still before E meets its share when it gets there. From E + 1 on all segments
    are permuted together.
    """

    num_segments: int
    positions: np.ndarray


@dataclass
class _LaneEpoch:
    """What one lane reads in one epoch: its first position, its segments and where each begins."""

    epoch: int
    start: int
    segments: list[int]
    bounds: list[int]


class _Era:
    """Epochs from ``first_epoch`` on over the segments with ``rows``; lane l begins at position ``starts[l]``."""

    def __init__(self, rows: np.ndarray, num_lanes: int, key: tuple[object, ...], first_epoch: int, starts: np.ndarray):
        self.first_epoch = first_epoch
        self.starts = starts
        self._rows = rows
        self._total = int(rows.sum())
        self._num_lanes = num_lanes
        self._key = key
        self._rounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch_at(self, lane: int, position: int) -> int:
        """The epoch that holds ``position`` of ``lane``."""
        number, rest = divmod(position - int(self.starts[lane]), self._total)
        _, before = self._round(number)
        # before[lane + j] - before[lane]: rows of the lane's first j epochs of the round
        within = int(np.searchsorted(before[lane : lane + self._num_lanes], before[lane] + rest, side="right")) - 1
        return self.first_epoch + number * self._num_lanes + within

    def starts_of(self, epoch: int) -> np.ndarray:
        """First position of each lane in ``epoch``."""
        number, within = divmod(epoch - self.first_epoch, self._num_lanes)
        _, before = self._round(number)
        lanes = np.arange(self._num_lanes)
        return self.starts + number * self._total + before[lanes + within] - before[lanes]

    def segments(self, epoch: int, lane: int) -> np.ndarray:
        """What ``lane`` reads in ``epoch``, in its order."""
        number, within = divmod(epoch - self.first_epoch, self._num_lanes)
        permutation, _ = self._round(number)
        group = (lane + within) % self._num_lanes
        segments = permutation[group :: self._num_lanes]
        return segments[keyed_permutation(len(segments), *self._key, epoch, group)]

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The permutation that deals a round's groups (group g is every L-th from g on), and the rows of groups summed
        up over two turns."""
        if number not in self._rounds:
            if len(self._rounds) >= _KEPT_ROUNDS:
                del self._rounds[next(iter(self._rounds))]
            permutation = keyed_permutation(len(self._rows), *self._key, "round", number)
            groups = np.arange(len(permutation)) % self._num_lanes
            rows = np.bincount(groups, weights=self._rows[permutation], minlength=self._num_lanes).astype(np.int64)
            self._rounds[number] = permutation, np.concatenate(([0], np.cumsum(np.concatenate((rows, rows)))))
        return self._rounds[number]


class LaneOrder:
    """Endless shuffled order over segments with ``rows_per_segment`` rows, in ``num_lanes`` lanes.

    ``additions`` come in the order of their positions; the first ``first_segments`` segments (None: all) are there from
    the start. Raises ValueError when there are more lanes than segments at the start.
    """

    def __init__(
        self,
        rows_per_segment: np.ndarray,
        num_lanes: int,
        seed: int | str,
        split: str,
        additions: Sequence[Addition] = (),
        first_segments: int | None = None,
    ) -> None:
        first = len(rows_per_segment) if first_segments is None else first_segments
        if not 1 <= num_lanes <= first:
            raise ValueError(
                f"num_lanes is {num_lanes}, but must lie between 1 and the {first} segments "
                f"of split {split!r}. What to do: lower num_lanes, or leave it out."
            )
        self.num_lanes = num_lanes
        self._rows = rows_per_segment
        self._key = (seed, split)
        self._sizes = [first, *(addition.num_segments for addition in additions)]
        self._additions = list(additions)
        self._added: dict[int, np.ndarray] = {}  # new segments of each addition, in the order in which they are dealt
        self._current: dict[int, _LaneEpoch] = {}
        self._eras = [_Era(rows_per_segment[:first], num_lanes, self._key, 0, np.zeros(num_lanes, dtype=np.int64))]
        self._joins: list[list[int]] = []  # additions that join in the last epoch of each era but the last
        for number in range(1, len(additions) + 1):
            self._add(number)

    def locate(self, index: int) -> Place:
        """The place of global sample ``index``."""
        position, lane = divmod(index, self.num_lanes)
        return self.locate_in_lane(lane, position)

    def locate_in_lane(self, lane: int, position: int) -> Place:
        """The place of a lane's ``position``, at the same cost wherever it lies."""
        current = self._current.get(lane)
        if current is None or not 0 <= position - current.start < current.bounds[-1]:
            current = self._current[lane] = self._find(lane, position)
        offset = position - current.start
        at = bisect_right(current.bounds, offset) - 1
        return Place(lane, current.epoch, current.segments[at], offset - current.bounds[at])

    def next_segment(self, place: Place) -> tuple[Place, int] | None:
        """First place of the segment that a lane reads after ``place``, its latest, and the distance in positions."""
        current = self._current[place.lane]
        assert current.epoch == place.epoch
        at = current.segments.index(place.segment)
        position = current.start + current.bounds[at] + place.row
        end = current.start + current.bounds[at + 1]
        if at + 1 < len(current.segments):
            return Place(place.lane, place.epoch, current.segments[at + 1], 0), end - position
        following = self._find(place.lane, end)  # not made current: the lane has not got there
        return Place(place.lane, following.epoch, following.segments[0], 0), end - position

    def segment_key(self, place: Place) -> tuple[object, ...]:
        """Key of every draw inside one visit of a segment."""
        return (*self._key, place.epoch, place.segment)

    def _find(self, lane: int, position: int) -> _LaneEpoch:
        number = max(n for n, era in enumerate(self._eras) if n == 0 or position >= era.starts[lane])
        era = self._eras[number]
        epoch = era.epoch_at(lane, position)
        if number + 1 < len(self._eras):
            epoch = min(epoch, self._eras[number + 1].first_epoch - 1)  # which additions have made longer
        start = int(era.starts_of(epoch)[lane])
        segments = era.segments(epoch, lane)
        if number < len(self._joins) and epoch == self._eras[number + 1].first_epoch - 1:
            for addition in self._joins[number]:
                segments = self._join(segments, addition, start, lane)
        bounds = [0, *np.cumsum(self._rows[segments]).tolist()]
        return _LaneEpoch(epoch, start, segments.tolist(), bounds)

    def _add(self, number: int) -> None:
        """Close the present era with the epoch that addition ``number`` joins, and begin the next one after it."""
        positions = self._additions[number - 1].positions
        era = self._eras[-1]
        if len(self._eras) > 1 and bool((positions < era.starts).all()):
            self._joins[-1].append(number)  # the epoch of the addition before
            self._eras.pop()
            next_epoch, starts = era.first_epoch, era.starts
        else:
            reached = [
                era.epoch_at(lane, int(position)) if position >= era.starts[lane] else era.first_epoch
                for lane, position in enumerate(positions)
            ]
            self._joins.append([number])
            next_epoch = max(reached) + 1
            starts = era.starts_of(next_epoch)
        share = np.array([int(self._rows[self._share(number, lane)].sum()) for lane in range(self.num_lanes)])
        key = (*self._key, "era", number)
        self._eras.append(_Era(self._rows[: self._sizes[number]], self.num_lanes, key, next_epoch, starts + share))

    def _share(self, number: int, lane: int) -> np.ndarray:
        """The lane's share of the new segments of addition ``number`` (from 1)."""
        if number not in self._added:
            old, new = self._sizes[number - 1], self._sizes[number]
            self._added[number] = old + keyed_permutation(new - old, *self._key, "added", number)
        return self._added[number][lane :: self.num_lanes]

    def _join(self, segments: np.ndarray, number: int, start: int, lane: int) -> np.ndarray:
        begins = start + np.cumsum(self._rows[segments]) - self._rows[segments]
        started = int((begins < self._additions[number - 1].positions[lane]).sum())
        rest = np.concatenate((segments[started:], self._share(number, lane)))
        rest = rest[keyed_permutation(len(rest), *self._key, "joined", number, lane)]
        return np.concatenate((segments[:started], rest))


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

    def locate_in_lane(self, lane: int, position: int) -> Place:
        """As :meth:`locate`: the only lane is the whole order."""
        return self.locate(position)

    def next_segment(self, place: Place) -> tuple[Place, int] | None:
        """First place of the next segment and its distance; None after the last."""
        start, end = int(self._bounds[place.segment]), int(self._bounds[place.segment + 1])
        if end >= self.num_samples:
            return None
        return Place(0, 0, place.segment + 1, 0), end - start - place.row
