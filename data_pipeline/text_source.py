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
from data_pipeline.packing import pack
from data_pipeline.plan import SegmentPlan, blocks_per_segment, make_plan
from data_pipeline.store.manifest import TOKENS_EXTENSION, Manifest, digest_of
from data_pipeline.store.reader import BlockReader

ORDER = "lanes-1"


@dataclass(frozen=True)
class _OpenSegment:
    """A segment that has been read, shuffled and packed, for its visit in one epoch.

    ``tokens`` are its blocks' tokens joined. ``row_order`` maps the row asked for to a packed row, whose
    pieces are ``piece_starts[row]`` up to ``piece_starts[row + 1]``. Each piece begins at ``piece_first`` in
    ``tokens`` and has ``piece_length`` positions. Lists, because indexing them one by one is several times
    faster than arrays.
    """

    visit: tuple[int, int]
    tokens: np.ndarray
    row_order: list[int]
    piece_starts: list[int]
    piece_first: list[int]
    piece_length: list[int]


class TextSource:
    """A ``SampleSource`` over one split of a prepared dataset.

    Keeps one open segment per lane that it has read: walking the order forwards packs every segment once,
    whatever share of the lanes this rank reads; memory is (lanes read) x (segment).
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
            _, segment, row = self._find(index)
            at = 0
            pieces = range(segment.piece_starts[row], segment.piece_starts[row + 1])
            for number, piece in enumerate(pieces):
                first, length = segment.piece_first[piece], segment.piece_length[piece]
                end = at + length
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
        """For each piece of row ``index``: shard, member, document in it, first token, positions, epoch,
        lane."""
        place, segment, row = self._find(index)
        blocks = [self._reader.blocks[b] for b in self._block_range(place.segment)]
        offsets = [self._reader.read(b).offsets for b in self._block_range(place.segment)]
        block_starts = np.cumsum([0] + [block.tokens for block in blocks])
        pieces = []
        for piece in range(segment.piece_starts[row], segment.piece_starts[row + 1]):
            first = segment.piece_first[piece]
            at = int(np.searchsorted(block_starts, first, side="right")) - 1
            within = first - int(block_starts[at])
            document = int(np.searchsorted(offsets[at], within, side="right")) - 1
            pieces.append(
                {
                    "shard": blocks[at].shard,
                    "member": f"{blocks[at].key}.{TOKENS_EXTENSION}",
                    "document": document,
                    "first_token": within - int(offsets[at][document]),
                    "positions": segment.piece_length[piece],
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
        return place, segment, segment.row_order[place.row]

    def _block_range(self, segment: int) -> range:
        return self._plan.block_range(segment, len(self._reader.blocks))

    def _open_segment(self, place: Place) -> _OpenSegment:
        blocks = [self._reader.read(b) for b in self._block_range(place.segment)]
        tokens = blocks[0].tokens if len(blocks) == 1 else np.concatenate([b.tokens for b in blocks])
        lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
        starts = np.cumsum(lengths) - lengths
        documents = np.arange(len(lengths))
        row_order = np.arange(self._plan.rows[place.segment])
        if isinstance(self._order, LaneOrder):
            key = self._order.segment_key(place)
            documents = keyed_permutation(len(documents), *key, "documents")
            row_order = keyed_permutation(len(row_order), *key, "rows")
        rows = pack(lengths[documents], self._sequence_length)
        assert len(rows) == len(row_order)
        return _OpenSegment(
            visit=(place.epoch, place.segment),
            tokens=tokens,
            row_order=row_order.tolist(),
            piece_starts=rows.piece_starts.tolist(),
            piece_first=(starts[documents[rows.document]] + rows.start).tolist(),
            piece_length=rows.length.tolist(),
        )


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
