"""Opening a segment of text: read its blocks, shuffle the documents, pack them into rows, stand in for what is lost.

T = tokens of the segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.keyed import keyed_permutation
from data_pipeline.packing import Rows, pack
from data_pipeline.plan import SegmentPlan
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION
from data_pipeline.store.reader import BlockArrays, BlockReader, Buffer, DamagedBlock

Key = tuple[object, ...]


Piece = tuple[int, int, int, int]
"""Where a piece lies in its row, its end there, where it lies in the segment's tokens, its end there."""


@dataclass
class OpenSegment:
    """A segment packed for one visit. ``pieces`` and ``spans`` are by row, in the order in which the visit reads
    them.

    ``tokens`` [T] are the tokens as stored. ``pieces[i]`` are the pieces of row i. ``described`` int32 [2, pieces]
    holds each piece's positions and the target of its last one, which is no token of the row; those of row i are
    ``described[:, begin:end]`` with ``spans[i] = (begin, end)``. Lists, because taking one item of them is several
    times faster than of arrays. ``lost`` are rows that damage makes unreadable, ``substitutes`` the segment and row
    that stand in for each.
    """

    number: int
    epoch: int
    tokens: np.ndarray
    pieces: list[list[Piece]]
    described: np.ndarray
    spans: list[tuple[int, int]]
    lost: set[int] = field(default_factory=set)
    substitutes: dict[int, tuple[OpenSegment, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pieces)


class SegmentOpener:
    """Opens segments of ``plan``. ``reserve`` are segments whose rows stand in for lost ones (none: any other)."""

    def __init__(
        self,
        reader: BlockReader,
        plan: SegmentPlan,
        sequence_length: int,
        packing: str,
        reserve: Sequence[int],
        bad_data: BadData,
    ) -> None:
        self._reader, self._plan = reader, plan
        self._sequence_length, self._packing = sequence_length, packing
        self._reserve = list(reserve)
        self._bad_data = bad_data
        self._dtype = np.dtype(reader.dtype)

    def open(self, number: int, epoch: int, key: Key | None, buffer: Buffer | None = None) -> OpenSegment:
        """Segment ``number`` for a visit that ``key`` shuffles (None: documents and rows as stored).

        ``buffer`` may be filled with the segment's bytes. Raises DamagedDataError and FetchError, as the policy for bad
        data says.
        """
        segment = self._open(number, epoch, key, buffer)
        if segment.lost:
            # Each lost row takes the next spare one, in the order in which they will be read.
            segment.substitutes = dict(zip(sorted(segment.lost), self._spares(segment, key), strict=False))
        return segment

    def _open(self, number: int, epoch: int, key: Key | None, buffer: Buffer | None = None) -> OpenSegment:
        """The segment without substitutes."""
        indices = self._plan.blocks(number)
        found = zip(self._reader.read_run(indices, buffer), indices, strict=True)
        results = [self._judged(result, block) for result, block in found]
        num_rows = int(self._plan.rows[number])
        offsets = [result.offsets for result in results if result.offsets is not None]
        if len(offsets) < len(results):
            # Without the lengths of one block nothing can be packed as planned: all rows of the visit are lost.
            none = np.zeros((2, 0), dtype=np.int32)
            nothing: list[list[Piece]] = [[] for _ in range(num_rows)]
            return OpenSegment(number, epoch, none[0], nothing, none, [(0, 0)] * num_rows, lost=set(range(num_rows)))
        parts = [self._tokens(result, block) for result, block in zip(results, indices, strict=True)]
        tokens_T = parts[0] if len(parts) == 1 else np.concatenate(parts)
        lengths = np.concatenate([np.diff(block_offsets) for block_offsets in offsets])
        documents = np.arange(len(lengths))
        packed_row = np.arange(num_rows)  # of each row in reading order
        if key is not None:
            documents = keyed_permutation(len(documents), *key, "documents")
            packed_row = keyed_permutation(num_rows, *key, "rows")
        rows = pack(lengths[documents], self._sequence_length, self._packing)
        if len(rows) != num_rows:
            raise DamagedDataError(
                f"{self._reader.shard_path(self._reader.blocks[indices[0]])}: a segment packs to {len(rows)} rows, the "
                f"plan says {num_rows}. What to do: remove the plan_*.npz files of this data set."
            )
        first = (np.cumsum(lengths) - lengths)[documents[rows.document]] + rows.start
        begin = np.cumsum(rows.length) - rows.length
        begin -= np.repeat(begin[rows.piece_starts[:-1]], np.diff(rows.piece_starts))  # from the start of the row
        columns = (begin, begin + rows.length, first, first + rows.length)
        pieces = list(zip(*(column.tolist() for column in columns), strict=True))
        borders = rows.piece_starts.tolist()
        spans = [(borders[row], borders[row + 1]) for row in packed_row.tolist()]
        return OpenSegment(
            number=number,
            epoch=epoch,
            tokens=tokens_T,
            pieces=[pieces[start:stop] for start, stop in spans],
            described=np.stack((rows.length, tokens_T[first + rows.length])).astype(np.int32),
            spans=spans,
            lost=self._lost(results, offsets, documents[rows.document], rows, packed_row),
        )

    @staticmethod
    def _lost(
        results: list[BlockArrays | DamagedBlock],
        offsets: list[np.ndarray],
        document: np.ndarray,
        rows: Rows,
        packed_row: np.ndarray,
    ) -> set[int]:
        """Rows that hold a piece of a damaged block."""
        is_damaged = [isinstance(result, DamagedBlock) for result in results]
        if not any(is_damaged):
            return set()
        is_lost = np.repeat(is_damaged, [len(block_offsets) - 1 for block_offsets in offsets])[document]
        row_is_lost = np.add.reduceat(is_lost, rows.piece_starts[:-1]) > 0
        return set(np.flatnonzero(row_is_lost[packed_row]).tolist())

    def _judged(self, result: BlockArrays | DamagedBlock, number: int) -> BlockArrays | DamagedBlock:
        """``result``, or damaged when the block is in quarantine; raises its error unless damage is substituted."""
        block = self._reader.blocks[number]
        if isinstance(result, DamagedBlock):
            self._bad_data.damaged(result.error)
        for extension in (OFFSETS_EXTENSION, TOKENS_EXTENSION):
            error = self._bad_data.known(block.shard, f"{block.key}.{extension}")
            if error is not None:
                return DamagedBlock(error, None if extension == OFFSETS_EXTENSION else result.offsets)
        return result

    def _tokens(self, result: Any, block: int) -> np.ndarray:
        if isinstance(result, DamagedBlock):
            return np.zeros(self._reader.blocks[block].tokens, dtype=self._dtype)
        return np.asarray(result.tokens)

    def _spares(self, segment: OpenSegment, key: Key | None) -> Iterator[tuple[OpenSegment, int]]:
        """Sound rows of other segments, in an order that depends on the visit of ``segment`` alone."""
        key = key or ("sequential", segment.number)
        candidates = self._reserve or [number for number in range(len(self._plan.rows)) if number != segment.number]
        for rank in keyed_permutation(len(candidates), *key, "reserve").tolist():
            spare = self._open(candidates[rank], segment.epoch, (*key, "spare"))
            yield from ((spare, row) for row in range(len(spare)) if row not in spare.lost)
        raise DamagedDataError(
            f"segment {segment.number} is damaged, and all {len(candidates)} segments that could stand in for its rows "
            "have been used up or are damaged too. What to do: restore the shards from a copy (pretrain data verify "
            "names all damage)."
        )
