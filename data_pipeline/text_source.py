"""Rows of packed text from a prepared dataset: :class:`TextSource` joins store, plan, packing and order.

S = sequence length, B = rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.keyed import keyed_permutation
from data_pipeline.order import LaneOrder, Place, SequentialOrder
from data_pipeline.packing import PACKING, Rows, pack
from data_pipeline.plan import SegmentPlan, blocks_per_segment, make_plan
from data_pipeline.store.manifest import TOKENS_EXTENSION, Manifest, digest_of
from data_pipeline.store.reader import BlockReader

ORDER = "lanes-1"


@dataclass(frozen=True)
class _OpenSegment:
    """A segment that has been read, shuffled and packed.

    ``tokens`` are its blocks' tokens joined; ``starts`` the first token of each document in packed order; ``stored``
    maps that order to stored documents; ``row_order`` maps the row asked for to a packed row.
    """

    visit: tuple[int, int]
    tokens: np.ndarray
    starts: np.ndarray
    stored: np.ndarray
    rows: Rows
    row_order: np.ndarray


class TextSource:
    """A ``SampleSource`` over one split of a prepared dataset.

    Keeps one open segment per lane that it has read: walking the order forwards packs every segment once, whatever
    share of the lanes this rank reads; memory is (lanes read) x (segment).
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        sequence_length: int,
        order: LaneOrder | SequentialOrder,
        plan: SegmentPlan,
        reader: BlockReader,
        fingerprint: str,
    ) -> None:
        self.fingerprint = fingerprint
        self.num_samples = order.num_samples if isinstance(order, SequentialOrder) else None
        self.num_bytes = manifest.split(split)["bytes"] if isinstance(order, SequentialOrder) else None
        self.num_lanes = order.num_lanes
        self._sequence_length = sequence_length
        self._order = order
        self._plan = plan
        self._reader = reader
        self._open: dict[int, _OpenSegment] = {}
        self._positions = np.arange(sequence_length, dtype=np.int32)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of global samples ``indices``; see :class:`data_pipeline.source.SampleSource`.

        Raises DamagedDataError, IndexError (finite sources).
        """
        shape = (len(indices), self._sequence_length)
        tokens = np.zeros(shape, dtype=np.int32)
        targets = np.zeros(shape, dtype=np.int32)
        segment_ids = np.full(shape, -1, dtype=np.int32)
        position_ids = np.zeros(shape, dtype=np.int32)
        for out, index in enumerate(indices):
            segment, packed_row = self._find(index)[1:]
            rows, at = segment.rows, 0
            for number, piece in enumerate(
                range(rows.piece_starts[packed_row], rows.piece_starts[packed_row + 1])
            ):
                first = segment.starts[rows.document[piece]] + rows.start[piece]
                end = at + rows.length[piece]
                length = end - at
                tokens[out, at:end] = segment.tokens[first : first + length]
                targets[out, at:end] = segment.tokens[first + 1 : first + 1 + length]
                segment_ids[out, at:end] = number
                position_ids[out, at:end] = self._positions[:length]
                at = end
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": segment_ids >= 0,
            "segment_ids": segment_ids,
            "position_ids": position_ids,
        }

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """For each piece of row ``index``: shard, member, document in it, first token, positions, epoch and lane."""
        place, segment, packed_row = self._find(index)
        blocks = [self._reader.blocks[b] for b in self._block_range(place.segment)]
        firsts = np.cumsum([0] + [block.documents for block in blocks])
        pieces = []
        for piece in range(segment.rows.piece_starts[packed_row], segment.rows.piece_starts[packed_row + 1]):
            document = int(segment.stored[segment.rows.document[piece]])
            at = int(np.searchsorted(firsts, document, side="right")) - 1
            pieces.append(
                {
                    "shard": blocks[at].shard,
                    "member": f"{blocks[at].key}.{TOKENS_EXTENSION}",
                    "document": document - int(firsts[at]),
                    "first_token": int(segment.rows.start[piece]),
                    "positions": int(segment.rows.length[piece]),
                    "epoch": place.epoch,
                    "lane": place.lane,
                }
            )
        return pieces

    def close(self) -> None:
        """Drop the open segments."""
        self._open.clear()

    def _find(self, index: int) -> tuple[Place, _OpenSegment, int]:
        place = self._order.locate(index)
        segment = self._open.get(place.lane)
        if segment is None or segment.visit != (place.epoch, place.segment):
            segment = self._open[place.lane] = self._open_segment(place)
        return place, segment, int(segment.row_order[place.row])

    def _block_range(self, segment: int) -> range:
        return self._plan.block_range(segment, len(self._reader.blocks))

    def _open_segment(self, place: Place) -> _OpenSegment:
        blocks = [self._reader.read(b) for b in self._block_range(place.segment)]
        tokens = blocks[0].tokens if len(blocks) == 1 else np.concatenate([b.tokens for b in blocks])
        lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
        starts = np.cumsum(lengths) - lengths
        stored = np.arange(len(lengths))
        shuffled = isinstance(self._order, LaneOrder)
        if isinstance(self._order, LaneOrder):
            key = self._order.segment_key(place)
            stored = keyed_permutation(len(lengths), *key, "documents")
        rows = pack(lengths[stored], self._sequence_length)
        assert len(rows) == self._plan.rows[place.segment]
        row_order = keyed_permutation(len(rows), *key, "rows") if shuffled else np.arange(len(rows))
        return _OpenSegment((place.epoch, place.segment), tokens, starts[stored], stored, rows, row_order)


def recommended_lanes(manifest: Manifest, num_blocks: int) -> int:
    """The manifest's number of lanes, lowered when the split has fewer blocks."""
    return max(1, min(int(manifest.content["num_lanes"]), num_blocks))


def train_source(
    manifest: Manifest, sequence_length: int, num_lanes: int | None, seed: int, split: str = "train"
) -> TextSource:
    """The endless shuffled source of ``split``.

    Raises ValueError when there are more lanes than segments, DamagedDataError.
    """
    reader = BlockReader(manifest, manifest.blocks(split))
    lanes = recommended_lanes(manifest, len(reader.blocks)) if num_lanes is None else num_lanes
    size = blocks_per_segment(len(reader.blocks), manifest.content["block_tokens"], sequence_length, lanes)
    plan = make_plan(manifest, reader, split, sequence_length, size)
    order = LaneOrder(plan.rows, lanes, seed, split)
    fingerprint = digest_of([plan.digest, lanes, seed, ORDER])
    return TextSource(manifest, split, sequence_length, order, plan, reader, fingerprint)


def sequential_source(manifest: Manifest, sequence_length: int, split: str = "validation") -> TextSource:
    """The finite source that holds every target of ``split`` exactly once, in stored order.

    Raises DamagedDataError.
    """
    reader = BlockReader(manifest, manifest.blocks(split))
    size = blocks_per_segment(4 * len(reader.blocks), manifest.content["block_tokens"], sequence_length, 1)
    plan = make_plan(manifest, reader, split, sequence_length, size)
    fingerprint = digest_of([plan.digest, "sequential"])
    return TextSource(manifest, split, sequence_length, SequentialOrder(plan.rows), plan, reader, fingerprint)
