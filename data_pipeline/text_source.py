"""Rows of packed text from a prepared dataset: :class:`TextSource` joins store, plan, packing and order.

S = sequence length, B = rows asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data_pipeline.batch import Arrays, unpack
from data_pipeline.errors import DamagedDataError
from data_pipeline.keyed import keyed_permutation
from data_pipeline.order import LaneOrder, Place, SequentialOrder
from data_pipeline.packing import pack
from data_pipeline.plan import SegmentPlan
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION
from data_pipeline.store.reader import BlockArrays, BlockReader, DamagedBlock

if TYPE_CHECKING:
    from data_pipeline.fetch.cache import SegmentCache

Address = tuple[int, int]
"""Lane of a source and position in it."""


@dataclass
class _OpenSegment:
    """A segment that has been read, shuffled and packed, for its visit in one epoch.

    ``pairs`` [2, T - 1] shows each token of its blocks above its target. ``row_order`` maps the row asked for to a
    packed row; ``pieces[row]`` lists its pieces as (place in the row, its end, place in ``pairs``, its end). Lists,
    because indexing them one by one is several times faster than arrays. ``lost`` are packed rows that damage makes
    unreadable; ``substitutes`` gives the segment and packed row that stand in for them.
    """

    number: int
    epoch: int
    pairs: np.ndarray
    row_order: list[int]
    pieces: list[list[tuple[int, int, int, int]]]
    lost: set[int] = field(default_factory=set)
    substitutes: dict[int, tuple[_OpenSegment, int]] = field(default_factory=dict)


@dataclass
class _Cursor:
    """Positions [begin, end) of a lane are the rows of ``segment``; ``place`` is the first of them."""

    begin: int
    end: int
    place: Place
    segment: _OpenSegment
    position: int


class TextSource:
    """A ``SampleSource`` over one split of a prepared dataset.

    Keeps one open segment per lane that it has read: walking the order forwards packs every segment once,
    whatever share of the lanes this rank reads; memory is (lanes read) x (segment).

    ``segments[i]`` is the plan's number of the order's segment i; ``reserve`` are segments that the order leaves out,
    to stand in for lost rows (when empty, rows of other segments are repeated). With a ``cache``, the segments that
    come next are fetched ahead.
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
        reserve: Sequence[int] = (),
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
        self._packing = packing
        self._order = order
        self._plan = plan
        self._segments = segments
        self._reserve = list(reserve)
        self._reader = reader
        self._cache = cache
        self._cursors: dict[int, _Cursor] = {}
        self._dtype = np.dtype(reader.dtype)

    def batch(self, indices: Sequence[int]) -> Arrays:
        """Rows of global samples ``indices``; see :class:`data_pipeline.source.SampleSource`.

        Raises DamagedDataError, FetchError, IndexError (finite sources).
        """
        return unpack(self.lean(indices))

    def lean(self, indices: Sequence[int]) -> Arrays:
        """Rows of global samples ``indices`` as a lean batch (:mod:`data_pipeline.batch`); raises as :meth:`batch`."""
        lanes = self.num_lanes
        return self.rows([(index % lanes, index // lanes) for index in indices])

    def rows(self, addresses: Sequence[Address]) -> Arrays:
        """Rows by lane and position, as a lean batch; raises as :meth:`batch`."""
        if self._cache is not None:
            self._look_ahead(addresses)
        cursors = self._cursors
        pairs = np.empty((len(addresses), 2, self._sequence_length), dtype=self._dtype)
        lengths = []
        substituted = []
        for out, (lane, position) in enumerate(addresses):
            cursor = cursors.get(lane)
            if cursor is None or not cursor.begin <= position < cursor.end:
                cursor = self._turn(lane, position)
            cursor.position = position
            segment = cursor.segment
            row = segment.row_order[position - cursor.begin]
            if row in segment.substitutes:
                segment, row = segment.substitutes[row]
                substituted.append(out)
            target, source = pairs[out], segment.pairs
            end = 0
            pieces = segment.pieces[row]
            for at, end, first, stop in pieces:
                target[:, at:end] = source[:, first:stop]
            target[:, end:] = 0
            lengths.append([end - at for at, end, _, _ in pieces])
        most = max(map(len, lengths), default=0)
        padded = [row_lengths + [0] * (most - len(row_lengths)) for row_lengths in lengths]
        lean = {
            "tokens": pairs[:, 0],
            "targets": pairs[:, 1],
            "pieces": np.array(padded, dtype=np.int32).reshape(len(addresses), most),
        }
        if self.bad_data.substitutes:
            lean["substituted"] = np.isin(np.arange(len(addresses)), substituted)
        return lean

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """For each piece of row ``index``: shard, member, document in it, first token, positions, epoch, lane, and
        whether it stands in for a row that was lost (``substitutes``)."""
        return self.provenance_at(index % self.num_lanes, index // self.num_lanes)

    def provenance_at(self, lane: int, position: int) -> list[dict[str, Any]]:
        """As :meth:`provenance`, by lane and position."""
        cursor = self._cursors.get(lane)
        if cursor is None or not cursor.begin <= position < cursor.end:
            cursor = self._turn(lane, position)
        segment, place = cursor.segment, cursor.place
        row = segment.row_order[position - cursor.begin]
        is_substitute = row in segment.substitutes
        if is_substitute:
            segment, row = segment.substitutes[row]
        indices = self._plan.blocks(segment.number)
        blocks = [self._reader.blocks[b] for b in indices]
        results = self._reader.read_run(indices)
        block_starts = np.cumsum([0] + [block.tokens for block in blocks])
        pieces = []
        for begin, end, first, _ in segment.pieces[row]:
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
                    "positions": end - begin,
                    "epoch": place.epoch,
                    "lane": place.lane,
                    "substitutes": is_substitute,
                }
            )
        return pieces

    def close(self) -> None:
        """Drop the open segments and end what is being fetched."""
        self._cursors.clear()
        if self._cache is not None:
            self._cache.close()

    def _turn(self, lane: int, position: int) -> _Cursor:
        """Open the segment that holds ``position`` of ``lane``, in place of the lane's present one."""
        place = self._order.locate_in_lane(lane, position)
        segment = self._open_for(place)
        begin = position - place.row
        first = Place(place.lane, place.epoch, place.segment, 0)
        cursor = _Cursor(begin, begin + len(segment.row_order), first, segment, position)
        self._cursors[lane] = cursor
        return cursor

    def _key(self, place: Place) -> tuple[object, ...] | None:
        return self._order.segment_key(place) if isinstance(self._order, LaneOrder) else None

    def _open_for(self, place: Place) -> _OpenSegment:
        key = self._key(place)
        segment = self._open_segment(int(self._segments[place.segment]), place.epoch, key)
        if segment.lost:
            spares = self._spare_rows(segment, key)
            # Each lost row takes the next spare one, in the order in which they will be read.
            for row in segment.row_order:
                if row in segment.lost:
                    segment.substitutes[row] = next(spares)
        return segment

    def _open_segment(self, number: int, epoch: int, key: tuple[object, ...] | None) -> _OpenSegment:
        """Read, shuffle and pack the plan's segment ``number``; rows that damage makes unreadable are ``lost``."""
        indices = self._plan.blocks(number)
        results = [
            self._judged(result, block) for result, block in zip(self._reader.read_run(indices), indices, strict=True)
        ]
        num_rows = int(self._plan.rows[number])
        offsets = [result.offsets for result in results if result.offsets is not None]
        if len(offsets) < len(results):
            # Without the lengths of one block nothing can be packed as planned: all rows of the visit are lost.
            nothing = np.zeros((2, 0), dtype=self._dtype)
            return _OpenSegment(number, epoch, nothing, list(range(num_rows)), [], lost=set(range(num_rows)))
        parts = [self._tokens(result, block) for result, block in zip(results, indices, strict=True)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        lengths = np.concatenate([np.diff(block_offsets) for block_offsets in offsets])
        starts = np.cumsum(lengths) - lengths
        documents = np.arange(len(lengths))
        row_order = np.arange(num_rows)
        if key is not None:
            documents = keyed_permutation(len(documents), *key, "documents")
            row_order = keyed_permutation(len(row_order), *key, "rows")
        rows = pack(lengths[documents], self._sequence_length, self._packing)
        if len(rows) != num_rows:
            raise DamagedDataError(
                f"{self._reader.shard_path(self._reader.blocks[indices[0]])}: a segment packs to {len(rows)} rows, the "
                f"plan says {num_rows}. What to do: remove the plan_*.npz files of this data set."
            )
        lost = set()
        if any(isinstance(result, DamagedBlock) for result in results):
            is_lost = np.repeat(
                [isinstance(result, DamagedBlock) for result in results],
                [len(block_offsets) - 1 for block_offsets in offsets],
            )[documents[rows.document]]
            lost = set(np.flatnonzero(np.add.reduceat(is_lost, rows.piece_starts[:-1])).tolist())
        ends = np.cumsum(rows.length)
        at = ends - rows.length  # positions before the piece, then within its row
        at -= np.repeat(at[rows.piece_starts[:-1]], np.diff(rows.piece_starts))
        first = starts[documents[rows.document]] + rows.start
        columns = (at, at + rows.length, first, first + rows.length)
        pieces = list(zip(*(column.tolist() for column in columns), strict=True))
        borders = rows.piece_starts.tolist()
        return _OpenSegment(
            number=number,
            epoch=epoch,
            pairs=sliding_window_view(tokens, len(tokens) - 1),
            row_order=row_order.tolist(),
            pieces=[pieces[begin:end] for begin, end in itertools.pairwise(borders)],
            lost=lost,
        )

    def _judged(self, result: BlockArrays | DamagedBlock, number: int) -> BlockArrays | DamagedBlock:
        """``result``, or damaged when the block is in quarantine; raises its error unless damage is substituted."""
        block = self._reader.blocks[number]
        if isinstance(result, DamagedBlock):
            self.bad_data.damaged(result.error)
        for extension in (OFFSETS_EXTENSION, TOKENS_EXTENSION):
            error = self.bad_data.known(block.shard, f"{block.key}.{extension}")
            if error is not None:
                return DamagedBlock(error, None if extension == OFFSETS_EXTENSION else result.offsets)
        return result

    def _tokens(self, result: Any, block: int) -> np.ndarray:
        if isinstance(result, DamagedBlock):
            return np.zeros(self._reader.blocks[block].tokens, dtype=self._dtype)
        return np.asarray(result.tokens)

    def _spare_rows(self, segment: _OpenSegment, key: tuple[object, ...] | None) -> Iterator[tuple[_OpenSegment, int]]:
        """Sound rows of other segments, in an order that depends on the visit of ``segment`` alone."""
        key = key or ("sequential", segment.number)
        candidates = self._reserve or [number for number in range(len(self._plan.rows)) if number != segment.number]
        for rank in keyed_permutation(len(candidates), *key, "reserve").tolist():
            spare = self._open_segment(candidates[rank], segment.epoch, (*key, "spare"))
            for row in spare.row_order:
                if row not in spare.lost:
                    yield spare, row
        raise DamagedDataError(
            f"segment {segment.number} is damaged, and all {len(candidates)} segments that could stand in for its rows "
            "have been used up or are damaged too. What to do: restore the shards from a copy (pretrain data verify "
            "names all damage)."
        )

    def _look_ahead(self, addresses: Sequence[Address]) -> None:
        """Announce what is to be read: segments that these rows open now, then each lane's next one, soonest first."""
        assert self._cache is not None
        opening: list[Place] = []
        for lane, position in addresses:
            cursor = self._cursors.get(lane)
            if cursor is None or not cursor.begin <= position < cursor.end:
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
