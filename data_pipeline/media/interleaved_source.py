"""Documents of text, images and speech in their order, packed into rows; no span of an image or recording is cut.

B = rows asked for, S = positions in a row, N images and M recordings in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_pipeline.batch import Arrays, unpack
from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange
from data_pipeline.keyed import keyed_permutation
from data_pipeline.media.audio import decode_speech
from data_pipeline.media.captions import TOKENS_MEMBER, parse_tokens
from data_pipeline.media.decode import ImageTransform, Limits, transformed
from data_pipeline.media.media_source import MediaSource, RowRequest
from data_pipeline.media.packing import Modality, SpanLayout, cut_documents
from data_pipeline.order import LaneOrder, Place
from data_pipeline.packing import Rows, pack_pieces
from data_pipeline.store.manifest import Sample


@dataclass(frozen=True)
class PackedSegment:
    """Packed rows of a segment; document d of ``rows`` is sample ``documents[d]``."""

    documents: list[int]
    rows: Rows


@dataclass(frozen=True)
class MediaSpan:
    """Pixels or samples of one span, and the positions of its placeholders in the row."""

    start: int
    length: int
    content: np.ndarray


@dataclass(frozen=True)
class InterleavedRow:
    """One packed row, filled up to the sum of ``pieces``; all arrays [that sum]."""

    tokens: np.ndarray
    targets: np.ndarray
    modalities: np.ndarray
    target_modalities: np.ndarray
    pieces: list[int]
    images: list[MediaSpan]
    speech: list[MediaSpan]


class InterleavedSource(MediaSource[PackedSegment, InterleavedRow]):
    """A batch has, besides what packed text has (``tokens``, ``targets``, ``seq_idx``, ``position_ids``,
    ``cu_seqlens``, ``max_seqlen``; see :func:`data_pipeline.batch.unpack`):

    ``loss_mask`` bool [B, S], True where the target is a token of text; ``modality_ids`` and ``target_modality_ids``
    int8 [B, S], 0 text, 1 image, 2 speech, -1 padding, the latter also where the target's span is not in the row;
    ``images`` uint8 [N, size, size, 3] with ``image_spans`` int32 [N, 3] (row, first position, positions of
    placeholders); ``speech`` float32 [M, frames of the longest] with ``speech_frames`` int32 [M] and ``speech_spans``
    int32 [M, 3].
    """

    def __init__(
        self,
        *arguments: Any,
        layout: SpanLayout,
        sequence_length: int,
        transform: ImageTransform,
        speech_rate: int,
        limits: Limits,
        vocab_size: int,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        import cv2

        cv2.setNumThreads(1)  # the threads of this source are the parallelism
        self.fill = self._plan.fill(sequence_length)
        self._layout, self._sequence_length = layout, sequence_length
        self._transform, self._speech_rate, self._limits = transform, speech_rate, limits
        self._vocab_size = vocab_size

    def _prepare(self, samples: list[Sample], payload: tuple[ByteRange, bytes] | None, place: Place) -> PackedSegment:
        documents = np.arange(len(samples))
        if isinstance(self._order, LaneOrder):
            documents = keyed_permutation(len(samples), *self._order.segment_key(place), "documents")
        spans = [samples[d].attributes["spans"] for d in documents.tolist()]
        pieces = cut_documents(spans, self._layout, self._sequence_length)
        rows = pack_pieces(*pieces, self._sequence_length)
        if len(rows) != int(self._plan.rows[place.segment]):
            raise DamagedDataError(
                f"{self._reader.path(samples[0].shard)}: a segment packs to {len(rows)} rows, the plan says "
                f"{int(self._plan.rows[place.segment])}. What to do: remove the plan_*.npz files of this data set.",
                shard=samples[0].shard,
            )
        return PackedSegment(documents.tolist(), rows)

    def _load(self, request: RowRequest[PackedSegment], slot: np.ndarray | None) -> InterleavedRow:
        packed = request.segment.content
        parts: list[InterleavedRow] = []
        at = 0
        for number, piece in enumerate(_pieces(packed.rows, request.row)):
            sample = request.segment.samples[packed.documents[int(packed.rows.document[piece])]]
            start, length = int(packed.rows.start[piece]), int(packed.rows.length[piece])
            parts.append(self._piece(request, sample, start, length, at, number))
            at += length
        return InterleavedRow(
            tokens=np.concatenate([part.tokens for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            modalities=np.concatenate([part.modalities for part in parts]),
            target_modalities=np.concatenate([part.target_modalities for part in parts]),
            pieces=[length for part in parts for length in part.pieces],
            images=[span for part in parts for span in part.images],
            speech=[span for part in parts for span in part.speech],
        )

    def _piece(
        self, request: RowRequest[PackedSegment], sample: Sample, start: int, length: int, at: int, number: int
    ) -> InterleavedRow:
        """Positions ``[start, start + length)`` of a document, which come to lie at ``at`` of the row."""
        spans = sample.attributes["spans"]
        places = self._layout.media_inside(spans, start, start + length)
        names = {place: self._media_name(sample, place) for place in places}
        members = self._members(request, sample, [TOKENS_MEMBER, *names.values()])
        text = self._decoded(sample, TOKENS_MEMBER, lambda: parse_tokens(members[TOKENS_MEMBER], self._vocab_size))
        expected = sum(int(span[1]) for span in spans if span[0] == "text")
        if len(text) != expected:
            raise self._reader.damaged(sample, TOKENS_MEMBER, f"{len(text)} tokens, the sidecar says {expected}")
        ids, modalities = self._layout.expand(spans, text)
        images: list[MediaSpan] = []
        speech: list[MediaSpan] = []
        for place, first in places.items():
            key = (*request.draw_key, number, place)
            decode = partial(self._media, spans[place][0], members[names[place]], key)
            content = self._decoded(sample, names[place], decode)
            span = MediaSpan(at + first - start, self._layout.media_tokens(spans[place]), content)
            (images if spans[place][0] == "image" else speech).append(span)
        target_modalities = modalities[start + 1 : start + 1 + length].copy()
        if target_modalities[-1] != Modality.TEXT:
            # A span without a start marker begins right after the cut: its content is in another row.
            target_modalities[-1] = Modality.PADDING
        return InterleavedRow(
            tokens=ids[start : start + length],
            targets=ids[start + 1 : start + 1 + length],
            modalities=modalities[start : start + length],
            target_modalities=target_modalities,
            pieces=[length],
            images=images,
            speech=speech,
        )

    def _media(self, kind: str, payload: memoryview, key: tuple[object, ...]) -> np.ndarray:
        if kind == "image":
            return transformed(payload, self._transform, self._limits, *key)
        return decode_speech(payload, self._limits, self._speech_rate)

    def _media_name(self, sample: Sample, place: int) -> str:
        prefix = f"{place:03d}."
        found = next((extension for extension in sample.members if extension.startswith(prefix)), None)
        return found or f"{place:03d}.{sample.attributes['spans'][place][0]}"

    def _collate(self, rows: list[InterleavedRow], allocated: np.ndarray | None) -> Arrays:
        shape = (len(rows), self._sequence_length)
        lean: Arrays = {
            "tokens": np.zeros(shape, dtype=np.int32),
            "targets": np.zeros(shape, dtype=np.int32),
            "modality_ids": np.full(shape, Modality.PADDING, dtype=np.int8),
            "target_modality_ids": np.full(shape, Modality.PADDING, dtype=np.int8),
            "row_pieces": np.array([len(row.pieces) for row in rows], dtype=np.int32),
            "pieces": np.array([[length, 0] for row in rows for length in row.pieces], dtype=np.int32).reshape(-1, 2).T,
        }
        for number, row in enumerate(rows):
            used = len(row.tokens)
            lean["tokens"][number, :used] = row.tokens
            lean["targets"][number, :used] = row.targets
            lean["modality_ids"][number, :used] = row.modalities
            lean["target_modality_ids"][number, :used] = row.target_modalities
        size = self._transform.size
        images = [(number, span) for number, row in enumerate(rows) for span in row.images]
        speech = [(number, span) for number, row in enumerate(rows) for span in row.speech]
        frames = np.array([len(span.content) for _, span in speech], dtype=np.int32)
        waves = np.zeros((len(speech), int(frames.max(initial=0))), dtype=np.float32)
        for number, (_, span) in enumerate(speech):
            waves[number, : len(span.content)] = span.content
        batch = unpack(lean)
        batch["loss_mask"] = batch["target_modality_ids"] == Modality.TEXT
        return batch | {
            "images": np.stack([span.content for _, span in images]) if images else _no_images(size),
            "image_spans": _span_table(images),
            "speech": waves,
            "speech_frames": frames,
            "speech_spans": _span_table(speech),
        }

    def _blank(self, row: InterleavedRow) -> InterleavedRow:
        nothing = row.tokens[:0]
        modalities = row.modalities[:0]
        return InterleavedRow(nothing, nothing, modalities, modalities, [], [], [])

    def _origins(self, request: RowRequest[PackedSegment]) -> list[dict[str, Any]]:
        packed = request.segment.content
        origins = []
        for piece in _pieces(packed.rows, request.row):
            sample = request.segment.samples[packed.documents[int(packed.rows.document[piece])]]
            origin = {
                "shard": sample.shard,
                "key": sample.key,
                "first_element": int(packed.rows.start[piece]),
                "positions": int(packed.rows.length[piece]),
            }
            if "source" in sample.attributes:
                origin["source"] = sample.attributes["source"]
            origins.append(origin)
        return origins


def _pieces(rows: Rows, row: int) -> range:
    return range(int(rows.piece_starts[row]), int(rows.piece_starts[row + 1]))


def _span_table(spans: Sequence[tuple[int, MediaSpan]]) -> np.ndarray:
    table = [(row, span.start, span.length) for row, span in spans]
    return np.array(table, dtype=np.int32).reshape(-1, 3)


def _no_images(size: int) -> np.ndarray:
    return np.zeros((0, size, size, 3), dtype=np.uint8)
