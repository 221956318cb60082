"""Rows of documents with images and speech: no span is cut, every text target comes exactly once."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.media.packing import Modality, SpanLayout, cut_document, cut_documents
from data_pipeline.media.plan import segments_of
from data_pipeline.packing import assign_rows, pack_pieces

LAYOUTS = [
    SpanLayout(image_tokens=5, image_id=100, speech_id=101),
    SpanLayout(
        image_tokens=4,
        image_id=100,
        image_start_id=102,
        image_end_id=103,
        speech_tokens_per_second=12.5,
        speech_id=101,
        speech_end_id=104,
    ),
]

spans = st.one_of(
    st.integers(0, 30).map(lambda count: ["text", count]),
    st.just(["image", 10, 10]),
    st.integers(1, 4000).map(lambda frames: ["speech", frames, 8000]),
)


@st.composite
def documents(draw: st.DrawFn) -> list[list[list[Any]]]:
    bodies = draw(st.lists(st.lists(spans, max_size=8), min_size=1, max_size=8))
    return [[["text", draw(st.integers(1, 20))], *body, ["text", draw(st.integers(1, 20))]] for body in bodies]


@settings(max_examples=150)
@given(documents(), st.integers(16, 60), st.sampled_from(LAYOUTS))
def test_spans_are_whole_and_text_targets_come_once(
    docs: list[list[list[Any]]], length: int, layout: SpanLayout
) -> None:
    document, start, positions = cut_documents(docs, layout, length)
    rows = pack_pieces(document, start, positions, length)
    assert sorted(zip(rows.document.tolist(), rows.start.tolist(), strict=True)) == sorted(
        zip(document.tolist(), start.tolist(), strict=True)
    )
    assert len(rows) == assign_rows(positions, length)[1]
    for first, stop in zip(rows.piece_starts[:-1], rows.piece_starts[1:], strict=True):
        assert 0 < rows.length[first:stop].sum() <= length
    inputs: Counter[tuple[int, int]] = Counter()
    targets: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], int] = {}
    for piece, (d, s, p) in enumerate(zip(document.tolist(), start.tolist(), positions.tolist(), strict=True)):
        inputs.update((d, element) for element in range(s, s + p))
        targets.update((d, element) for element in range(s + 1, s + 1 + p))
        where.update({(d, element): piece for element in range(s, s + p)})
    for number, doc in enumerate(docs):
        at = 0
        for span in doc:
            end = at + layout.width(span)
            if span[0] != "text":
                assert len({where[number, element] for element in range(at, end)}) == 1
            at = end
        assert all(targets[number, element] == 1 for element in range(1, at))
        assert targets[number, 0] == 0
        assert all(inputs[number, element] == 1 for element in range(at - 1))


@given(documents(), st.sampled_from(LAYOUTS))
def test_elements_are_text_in_order_with_placeholders_between(docs: list[list[list[Any]]], layout: SpanLayout) -> None:
    for doc in docs:
        text = np.arange(1000, 1000 + sum(span[1] for span in doc if span[0] == "text"))
        ids, modalities = layout.expand(doc, text)
        assert ids[(modalities == Modality.TEXT) & (ids >= 1000)].tolist() == text.tolist()
        media = [span for span in doc if span[0] != "text"]
        assert int((modalities == Modality.IMAGE).sum()) == layout.image_tokens * sum(s[0] == "image" for s in media)
        inside = layout.media_inside(doc, 0, len(ids))
        assert list(inside) == [place for place, span in enumerate(doc) if span[0] != "text"]
        for place, first in inside.items():
            length = layout.media_tokens(doc[place])
            kind = Modality.IMAGE if doc[place][0] == "image" else Modality.SPEECH
            assert (modalities[first : first + length] == kind).all()
            start, end = layout.markers(doc[place][0])
            assert start is None or (ids[first - 1], modalities[first - 1]) == (start, Modality.TEXT)
            assert end is None or (ids[first + length], modalities[first + length]) == (end, Modality.TEXT)


@given(st.integers(1, 10**7), st.sampled_from([8000, 16000, 44100, 48000]), st.sampled_from([12.5, 25.0, 50.0, 0.1]))
def test_speech_tokens_are_rounded_up_exactly(frames: int, rate: int, per_second: float) -> None:
    tokens = SpanLayout(image_tokens=1, speech_tokens_per_second=per_second).speech_tokens(frames, rate)
    exact = Fraction(frames, rate) * Fraction(str(per_second))
    assert tokens - 1 < exact <= tokens or tokens == 1


def test_cuts_are_as_late_as_they_can_be() -> None:
    assert cut_document([100], [True], 40) == [(0, 40), (40, 40), (80, 19)]
    # An image of 30 elements from 35 on does not fit behind 35 elements of text in a row of 40.
    assert cut_document([35, 30, 35], [True, False, True], 40) == [(0, 35), (35, 40), (75, 24)]
    assert cut_document([10, 30, 1], [True, False, True], 40) == [(0, 40)]
    assert cut_document([1, 40, 40, 1], [True, False, False, True], 40) == [(0, 1), (1, 40), (41, 40)]


def test_a_span_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 41 positions, a row has 40"):
        cut_document([3, 41, 2], [True, False, True], 40)


def test_segments_close_when_they_are_full() -> None:
    assert segments_of([5, 5, 5, 30, 1], 10) == [(0, 2), (2, 2), (4, 1)]
    assert segments_of([3, 3], 10) == [(0, 2)]
    assert segments_of([], 10) == []
