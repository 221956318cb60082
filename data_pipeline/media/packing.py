"""Cutting and packing documents of text with images and speech in between: a span of either is never cut.

A document is a row of elements: its text tokens, and for each image or recording a run of placeholders with a start
and an end marker around it where the layout names such tokens. As in :mod:`data_pipeline.packing`, a position holds
an element and its target, the next element of the same document, and consecutive pieces overlap by one element. A cut
falls between spans or inside text, so all placeholders of a span, markers included, are inputs of one row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

SPAN_PACKING = "atomic-spans-best-fit-decreasing-1"


class Modality(IntEnum):
    """What a position holds. Markers around a span are text: they are tokens of the vocabulary."""

    PADDING = -1
    TEXT = 0
    IMAGE = 1
    SPEECH = 2


@dataclass(frozen=True, kw_only=True)
class SpanLayout:
    """How many positions images and recordings take, and the token ids that stand for them.

    ``image_tokens`` positions for every image; ``speech_tokens_per_second`` for a recording, rounded up. The ids of
    placeholders fill ``tokens`` and ``targets``; the model puts its own embeddings or codes there. A marker of None
    is left out.
    """

    image_tokens: int
    speech_tokens_per_second: float = 25.0
    image_id: int = 0
    image_start_id: int | None = None
    image_end_id: int | None = None
    speech_id: int = 0
    speech_start_id: int | None = None
    speech_end_id: int | None = None

    def media_tokens(self, span: Sequence[Any]) -> int:
        """Placeholders of one span of a sidecar, ``["image", height, width]`` or ``["speech", frames, rate]``."""
        if span[0] == "image":
            return self.image_tokens
        _, frames, rate = span
        return self.speech_tokens(int(frames), int(rate))

    def speech_tokens(self, frames: int, rate: int) -> int:
        """Placeholders of a recording of ``frames`` samples at ``rate`` Hz."""
        return max(1, -(-frames * Fraction(str(self.speech_tokens_per_second)) // rate))

    def markers(self, kind: str) -> tuple[int | None, int | None]:
        """(start, end) marker of ``image`` or ``speech``."""
        if kind == "image":
            return self.image_start_id, self.image_end_id
        return self.speech_start_id, self.speech_end_id

    def media_inside(self, spans: Sequence[Sequence[Any]], start: int, stop: int) -> dict[int, int]:
        """The images and recordings among elements ``[start, stop)``: number of the span -> first placeholder."""
        found = {}
        at = 0
        for place, span in enumerate(spans):
            width = self.width(span)
            if span[0] != "text" and start <= at < stop:
                found[place] = at + (self.markers(span[0])[0] is not None)
            at += width
        return found

    def expand(self, spans: Sequence[Sequence[Any]], text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Elements of a document: ids (int32) and modalities (int8); ``text`` are its text tokens, joined."""
        widths = [self.width(span) for span in spans]
        ids = np.empty(sum(widths), dtype=np.int32)
        modalities = np.full(len(ids), Modality.TEXT, dtype=np.int8)
        at = used = 0
        for span, width in zip(spans, widths, strict=True):
            end = at + width
            if span[0] == "text":
                ids[at:end] = text[used : used + width]
                used += width
            else:
                is_image = span[0] == "image"
                ids[at:end] = self.image_id if is_image else self.speech_id
                first, last = at, end
                start_marker, end_marker = self.markers(span[0])
                if start_marker is not None:
                    ids[at], first = start_marker, at + 1
                if end_marker is not None:
                    ids[end - 1], last = end_marker, end - 1
                modalities[first:last] = Modality.IMAGE if is_image else Modality.SPEECH
            at = end
        return ids, modalities

    def width(self, span: Sequence[Any]) -> int:
        """Elements of a span: tokens of text, or placeholders and markers."""
        if span[0] == "text":
            return int(span[1])
        return self.media_tokens(span) + sum(marker is not None for marker in self.markers(span[0]))


def cut_document(widths: Sequence[int], is_text: Sequence[bool], sequence_length: int) -> list[tuple[int, int]]:
    """Pieces of a document whose spans have ``widths`` elements: (first element, positions), in order.

    Each piece is as long as it can be. Every element but the first is the target of exactly one position.
    Raises ValueError when a span that is not text is longer than a row.
    """
    ends = list(accumulate(widths))
    starts = [end - width for end, width in zip(ends, widths, strict=True)]
    atom_starts = [start for start, text in zip(starts, is_text, strict=True) if not text]
    atom_ends = [end for end, text in zip(ends, is_text, strict=True) if not text]
    last = ends[-1] - 1 if ends else 0
    pieces = []
    at = 0
    while at < last:
        end = min(at + sequence_length, last)
        before = bisect_left(atom_starts, end) - 1  # the last span that begins before the cut
        if before >= 0 and end < atom_ends[before]:
            end = atom_starts[before]
            if end <= at:
                width = atom_ends[before] - atom_starts[before]
                raise ValueError(f"a span takes {width} positions, a row has {sequence_length}")
        pieces.append((at, end - at))
        at = end
    return pieces


def cut_documents(
    documents: Iterable[Sequence[Sequence[Any]]], layout: SpanLayout, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of documents given by their ``spans``: int64 arrays (document, first element, positions).

    Raises ValueError as :func:`cut_document`, naming the document by its number.
    """
    pieces: list[tuple[int, int, int]] = []
    for number, spans in enumerate(documents):
        widths = [layout.width(span) for span in spans]
        try:
            cuts = cut_document(widths, [span[0] == "text" for span in spans], sequence_length)
        except ValueError as error:
            raise ValueError(f"document {number}: {error}") from None
        pieces.extend((number, start, positions) for start, positions in cuts)
    table = np.array(pieces, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
