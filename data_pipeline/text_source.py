"""Rows of packed text from a prepared dataset: :class:`TextSource` joins store, plan, packing and order.

S = sequence length, B = rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.array_pool import ArrayPool
from data_pipeline.batch import Arrays, reorder_pieces, unpack
from data_pipeline.order import LaneOrder, Place, SequentialOrder
from data_pipeline.plan import SegmentPlan
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import TOKENS_EXTENSION
from data_pipeline.store.reader import BlockReader, Buffer
from data_pipeline.text_segment import OpenSegment, SegmentOpener

if TYPE_CHECKING:
    from data_pipeline.fetch.cache import SegmentCache

_MOST_POOLS = 16

Address = tuple[int, int]
"""Lane of a source and position in it."""


@dataclass
class _Cursor:
    """``count`` positions from ``begin`` on of a lane are the rows of ``segment``; ``place`` is the first of them,
    ``position`` the one read last."""

    begin: int
    count: int
    place: Place
    segment: OpenSegment
    position: int
    buffer: Buffer


class TextSource:
    """A ``SampleSource`` over one split of a prepared dataset.

    Keeps one open segment per lane that it has read: walking the order forwards packs every segment once,
    whatever share of the lanes this rank reads; memory is (lanes read) x (segment).

    ``segments[i]`` is the plan's number of the order's segment i; ``spares`` are the plan's segments whose rows stand
    in for lost ones. With a ``cache``, the segments that come next are fetched ahead.
    """

    def __init__(
        self,
        *,
        order: LaneOrder | SequentialOrder,
        plan: SegmentPlan,
        segments: np.ndarray,
        reader: BlockReader,
        sequence_length: int,
        packing: str,
        fingerprint: str,
        num_bytes: int | None = None,
        spares: Sequence[int],
        bad_data: BadData | None = None,
        cache: SegmentCache | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.num_samples = order.num_samples if isinstance(order, SequentialOrder) else None
        self.num_bytes = num_bytes
        self.num_lanes = order.num_lanes
        self.bad_data = bad_data or BadData()
        self.timeline: list[list[Any]] = []
        self.fill = plan.fill(sequence_length)
        self.rows_per_epoch = int(plan.rows[segments].sum())
        self.num_segments = len(segments)
        # Each position of a segment is a token, and each of its documents has one more.
        self.segment_bytes = float(plan.positions.mean()) * np.dtype(reader.dtype).itemsize
        self._sequence_length = sequence_length
        self._order = order
        self._plan = plan
        self._segments = segments
        self._reader = reader
        self._cache = cache
        self._opener = SegmentOpener(reader, plan, sequence_length, packing, spares, self.bad_data)
        self._cursors: dict[int, _Cursor] = {}
        self._dtype = np.dtype(reader.dtype)
        self._pools: dict[int, ArrayPool] = {}  # by rows of a batch

    def batch(self, indices: Sequence[int]) -> Arrays:
        """Rows of global samples ``indices``; see :class:`data_pipeline.source.SampleSource`.

        Raises DamagedDataError, FetchError, IndexError (finite sources).
        """
        return unpack(self.lean(indices))

    def lean(self, indices: Sequence[int]) -> Arrays:
        """Rows of global samples ``indices`` as a lean batch (:mod:`data_pipeline.batch`); raises as :meth:`batch`."""
        index = np.asarray(indices, dtype=np.int64)
        return self._gather(index % self.num_lanes, index // self.num_lanes)

    def rows(self, addresses: Sequence[Address]) -> Arrays:
        """Rows by lane and position, as a lean batch; raises as :meth:`batch`."""
        lanes_positions = np.array(addresses, dtype=np.int64).reshape(len(addresses), 2)
        return self._gather(lanes_positions[:, 0], lanes_positions[:, 1])

    def _gather(self, lanes: np.ndarray, positions: np.ndarray) -> Arrays:
        """Rows [N] by lane and position. Neighbouring rows of one lane are copied at once, so many rows are cheaper."""
        if self._cache is not None:
            self._look_ahead(list(zip(lanes.tolist(), positions.tolist(), strict=True)))
        tokens = self._memory(len(lanes))
        by_lane = np.argsort(lanes, kind="stable")
        place, position, lane = by_lane.tolist(), positions[by_lane].tolist(), lanes[by_lane].tolist()
        counts: list[np.ndarray] = []
        pieces: list[np.ndarray] = []
        substituted: list[int] = []
        at = 0
        while at < len(place):
            cursor = self._cursors.get(lane[at])
            if cursor is None or not 0 <= position[at] - cursor.begin < cursor.count:
                cursor = self._turn(lane[at], position[at])
            segment, row = cursor.segment, position[at] - cursor.begin
            # The run of rows that lie one after the other here, and at equal distances in the batch.
            stop = at + 1
            step = place[stop] - place[at] if stop < len(place) else 1
            while (
                stop < len(place)
                and lane[stop] == lane[at]
                and position[stop] - position[at] == stop - at < cursor.count - row
                and place[stop] - place[at] == (stop - at) * step
            ):
                stop += 1
            count = stop - at
            tokens[place[at] : place[stop - 1] + 1 : step if count > 1 else 1] = segment.tokens[row : row + count]
            counts.append(segment.row_pieces[row : row + count])
            pieces.append(segment.pieces[:, segment.starts[row] : segment.starts[row + count]])
            if segment.substitutes:
                substituted += [place[at + i] for i in range(count) if row + i in segment.substitutes]
            cursor.position = position[stop - 1]
            at = stop
        lean = {
            "tokens": tokens,
            "row_pieces": np.concatenate(counts) if counts else np.zeros(0, dtype=np.int32),
            "pieces": np.concatenate(pieces, axis=1) if pieces else np.zeros((2, 0), dtype=np.int32),
        }
        lean |= reorder_pieces(lean, by_lane)
        if self.bad_data.substitutes:
            lean["substituted"] = np.isin(np.arange(len(place)), substituted)
        return lean

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """For each piece of row ``index``: shard, member, document in it, first token, positions, epoch, lane, and
        whether it stands in for a row that was lost (``substitutes``)."""
        return self.provenance_at(index % self.num_lanes, index // self.num_lanes)

    def provenance_at(self, lane: int, position: int) -> list[dict[str, Any]]:
        """As :meth:`provenance`, by lane and position."""
        cursor = self._cursors.get(lane)
        if cursor is None or not 0 <= position - cursor.begin < cursor.count:
            cursor = self._turn(lane, position)
        place, row = cursor.place, position - cursor.begin
        is_substitute = row in cursor.segment.substitutes
        segment, row = cursor.segment.substitutes.get(row, (cursor.segment, row))
        indices = self._plan.blocks(segment.number)
        blocks = [self._reader.blocks[b] for b in indices]
        results = self._reader.read_run(indices)
        block_starts = np.cumsum([0] + [block.tokens for block in blocks])
        pieces = []
        span = segment.span(row)
        for first, length in zip(segment.origins[span].tolist(), segment.pieces[0, span].tolist(), strict=True):
            at = int(np.searchsorted(block_starts, first, side="right")) - 1
            within = first - int(block_starts[at])
            offsets = results[at].offsets
            assert offsets is not None
            document = int(np.searchsorted(offsets, within, side="right")) - 1
            pieces.append(
                {
                    "shard": blocks[at].shard,
                    "member": f"{blocks[at].key}.{TOKENS_EXTENSION}",
                    "document": document,
                    "first_token": within - int(offsets[document]),
                    "positions": length,
                    "epoch": place.epoch,
                    "lane": place.lane,
                    "substitutes": is_substitute,
                }
            )
        return pieces

    def counters(self) -> dict[str, float]:
        """Requests, bytes, retries, hits, waits and evictions so far; empty for a local dataset."""
        return {} if self._cache is None else self._cache.describe()

    def close(self) -> None:
        """Drop the open segments and end what is being fetched."""
        self._cursors.clear()
        if self._cache is not None:
            self._cache.close()

    def _turn(self, lane: int, position: int) -> _Cursor:
        """Open the segment that holds ``position`` of ``lane``, in place of the lane's present one."""
        place = self._order.locate_in_lane(lane, position)
        key = self._order.segment_key(place) if isinstance(self._order, LaneOrder) else None
        # The lane's present segment is done with: the memory is the next one's. Batches are copies.
        before = self._cursors.pop(lane, None)
        buffer = Buffer() if before is None else before.buffer
        segment = self._opener.open(int(self._segments[place.segment]), place.epoch, key, buffer)
        first = Place(place.lane, place.epoch, place.segment, 0)
        cursor = self._cursors[lane] = _Cursor(position - place.row, len(segment), first, segment, position, buffer)
        return cursor

    def _memory(self, num_rows: int) -> np.ndarray:
        pool = self._pools.get(num_rows)
        if pool is None:
            if len(self._pools) >= _MOST_POOLS:
                self._pools.clear()
            pool = self._pools[num_rows] = ArrayPool((num_rows, self._sequence_length), self._dtype)
        return pool.take()

    def _look_ahead(self, addresses: Sequence[Address]) -> None:
        """Announce what is to be read: segments that these rows open now, then each lane's next one, soonest first."""
        assert self._cache is not None
        opening: list[Place] = []
        for lane, position in addresses:
            cursor = self._cursors.get(lane)
            if cursor is None or not 0 <= position - cursor.begin < cursor.count:
                opening.append(self._order.locate_in_lane(lane, position))
        if not opening:
            return
        current = {
            lane: Place(lane, cursor.place.epoch, cursor.place.segment, cursor.position - cursor.begin)
            for lane, cursor in self._cursors.items()
        }
        current |= {place.lane: place for place in opening}
        following = []
        for place in current.values():
            coming = self._order.next_segment(place)
            if coming is not None:
                following.append((coming[1], place.lane, coming[0]))
        following.sort(key=lambda item: item[:2])
        upcoming = []
        for place in [*opening, *(place for _, _, place in following)]:
            upcoming.extend(self._reader.ranges(self._plan.blocks(int(self._segments[place.segment]))))
        self._cache.prefetch(upcoming)
