"""Opening a segment of text: read its blocks, shuffle the documents, pack them into rows, stand in for what is lost.

R = rows of the segment, S = positions in a row, T = tokens of the segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.keyed import keyed_permutation
from data_pipeline.packing import pack
from data_pipeline.plan import SegmentPlan
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION
from data_pipeline.store.reader import BlockArrays, BlockReader, Buffer, DamagedBlock

Key = tuple[object, ...]


@dataclass
class OpenSegment:
    """A segment packed for one visit; everything by row, in the order in which the visit reads them.

    ``tokens`` [R, S] in the stored dtype, 0 on padding. ``row_pieces`` int32 [R] is the number of pieces in each row;
    those of row i are ``pieces[:, starts[i] : starts[i + 1]]``, int32: the positions of each piece, and the target of
    its last one, which is no token of the row. ``lost`` are rows that damage makes unreadable, ``substitutes`` the
    segment and row that each was filled from.
    """

    number: int
    epoch: int
    tokens: np.ndarray
    row_pieces: np.ndarray
    starts: np.ndarray
    pieces: np.ndarray
    origins: np.ndarray  # first token of each piece, counted in the segment's tokens as stored
    lost: set[int] = field(default_factory=set)
    substitutes: dict[int, tuple[OpenSegment, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row_pieces)

    def span(self, row: int) -> slice:
        """Where the pieces of ``row`` are."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))


class SegmentOpener:
    """Opens segments of ``plan``. Rows of ``spares``, segments in effect from the start, stand in for lost ones."""

    def __init__(
        self,
        reader: BlockReader,
        plan: SegmentPlan,
        sequence_length: int,
        packing: str,
        spares: Sequence[int],
        bad_data: BadData,
    ) -> None:
        self._reader, self._plan = reader, plan
        self._sequence_length, self._packing = sequence_length, packing
        self._spare_segments = list(spares)
        self._bad_data = bad_data
        self._dtype = np.dtype(reader.dtype)
        self._scratch = Buffer()

    def open(self, number: int, epoch: int, key: Key | None, buffer: Buffer | None = None) -> OpenSegment:
        """Segment ``number`` for a visit that ``key`` shuffles (None: documents and rows as stored).

        ``buffer`` may be filled with the segment's rows. Raises DamagedDataError and FetchError, as the policy for bad
        data says.
        """
        segment = self._open(number, epoch, key, buffer)
        if segment.lost:
            # Each lost row takes the next spare one, in the order in which they will be read.
            segment.substitutes = dict(zip(sorted(segment.lost), self._spares(segment, key), strict=False))
            _fill_lost(segment)
        return segment

    def _open(self, number: int, epoch: int, key: Key | None, buffer: Buffer | None = None) -> OpenSegment:
        """The segment without substitutes."""
        indices = self._plan.blocks(number)
        found = zip(self._reader.read_run(indices, self._scratch), indices, strict=True)
        results = [self._judged(result, block) for result, block in found]
        num_rows = int(self._plan.rows[number])
        tokens_RS = self._rows_memory(num_rows, buffer)
        offsets = [result.offsets for result in results if result.offsets is not None]
        if len(offsets) < len(results):
            # Without the lengths of one block nothing can be packed as planned: all rows of the visit are lost.
            counts = np.zeros(num_rows, dtype=np.int32)
            none = np.zeros((2, 0), dtype=np.int32)
            starts = np.zeros(num_rows + 1, dtype=np.int64)
            rows_lost = set(range(num_rows))
            return OpenSegment(number, epoch, tokens_RS, counts, starts, none, none[0], lost=rows_lost)
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
        counts = np.diff(rows.piece_starts)[packed_row]
        starts = np.concatenate(([0], np.cumsum(counts)))
        # Pieces row after row as they will be read.
        order = np.arange(starts[-1]) + np.repeat(rows.piece_starts[:-1][packed_row] - starts[:-1], counts)
        document, length = documents[rows.document[order]], rows.length[order]
        first = (np.cumsum(lengths) - lengths)[document] + rows.start[order]
        _fill(tokens_RS, tokens_T, starts, counts, first, length)
        return OpenSegment(
            number=number,
            epoch=epoch,
            tokens=tokens_RS,
            row_pieces=counts.astype(np.int32),
            starts=starts,
            pieces=np.stack((length, tokens_T[first + length])).astype(np.int32),
            origins=first,
            lost=self._lost(results, offsets, document, starts),
        )

    def _rows_memory(self, num_rows: int, buffer: Buffer | None) -> np.ndarray:
        shape = (num_rows, self._sequence_length)
        if buffer is None:
            return np.zeros(shape, dtype=self._dtype)
        size = num_rows * self._sequence_length * self._dtype.itemsize
        return np.frombuffer(buffer.view(size), dtype=self._dtype).reshape(shape)

    @staticmethod
    def _lost(
        results: list[BlockArrays | DamagedBlock],
        offsets: list[np.ndarray],
        document: np.ndarray,
        starts: np.ndarray,
    ) -> set[int]:
        """Rows that hold a piece of a damaged block; ``document`` is that of each piece."""
        is_damaged = [isinstance(result, DamagedBlock) for result in results]
        if not any(is_damaged):
            return set()
        is_lost = np.repeat(is_damaged, [len(block_offsets) - 1 for block_offsets in offsets])[document]
        return set(np.flatnonzero(np.add.reduceat(is_lost, starts[:-1])).tolist())

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
        """Sound rows of other segments, then those of ``segment`` itself, in an order that depends on its visit
        alone."""
        key = key or ("sequential", segment.number)
        candidates = [number for number in self._spare_segments if number != segment.number]
        for rank in keyed_permutation(len(candidates), *key, "reserve").tolist():
            spare = self._open(candidates[rank], segment.epoch, (*key, "spare"))
            yield from ((spare, row) for row in range(len(spare)) if row not in spare.lost)
        yield from ((segment, row) for row in range(len(segment)) if row not in segment.lost)
        raise DamagedDataError(
            f"segment {segment.number} is damaged, and all {len(candidates)} segments that could stand in for its rows "
            "have been used up or are damaged too. What to do: restore the shards from a copy (pretrain data verify "
            "names all damage)."
        )


def _fill(
    tokens_RS: np.ndarray,
    tokens_T: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
) -> None:
    """Copy pieces to their rows, one after the other from the start of each, and zeros after the last."""
    num_rows, sequence_length = tokens_RS.shape
    before = np.cumsum(length) - length
    row_start = np.arange(num_rows) * sequence_length
    # Where a piece goes, in the rows as one sequence.
    begin = before + np.repeat(row_start - before[starts[:-1]], counts)
    flat = tokens_RS.reshape(-1)
    columns = (begin, begin + length, first, first + length)
    for to, to_end, source, source_end in zip(*(column.tolist() for column in columns), strict=True):
        flat[to:to_end] = tokens_T[source:source_end]
    row_end = (begin + length)[starts[1:] - 1]
    for end, stop in zip(row_end.tolist(), (row_start + sequence_length).tolist(), strict=True):
        if end < stop:
            flat[end:stop] = 0


def _fill_lost(segment: OpenSegment) -> None:
    """Put the rows of ``segment.substitutes`` into the segment."""
    parts, origins = [], []
    for row in range(len(segment)):
        source, source_row = segment.substitutes.get(row, (segment, row))
        parts.append(source.pieces[:, source.span(source_row)])
        origins.append(source.origins[source.span(source_row)])
        if row in segment.substitutes:
            segment.tokens[row] = source.tokens[source_row]
    counts = [part.shape[1] for part in parts]
    segment.row_pieces = np.array(counts, dtype=np.int32)
    segment.starts = np.concatenate(([0], np.cumsum(counts)))
    segment.pieces = np.concatenate(parts, axis=1)
    segment.origins = np.concatenate(origins)
