"""Cutting and packing: every target once, no row too long, no more rows than needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import BEST_FIT, CONCATENATE, assign_rows, count_rows, cut, pack

lengths_lists = st.lists(st.integers(2, 70), min_size=1, max_size=40)
sequence_lengths = st.integers(2, 24)
packings = pytest.mark.parametrize("packing", [BEST_FIT, CONCATENATE])


@packings
@given(lengths=lengths_lists, sequence_length=sequence_lengths)
def test_every_target_lies_in_exactly_one_row(lengths: list[int], sequence_length: int, packing: str) -> None:
    rows = pack(np.array(lengths), sequence_length, packing)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for row in range(len(rows)):
        used = 0
        for piece in range(rows.piece_starts[row], rows.piece_starts[row + 1]):
            document, start, length = rows.document[piece], rows.start[piece], rows.length[piece]
            assert length > 0
            seen[document][start + 1 : start + 1 + length] += 1
            used += length
        assert 0 < used <= sequence_length
    for counts in seen:
        assert counts[0] == 0  # the first token has nothing before it
        assert (counts[1:] == 1).all()


@packings
@given(lengths=lengths_lists, sequence_length=sequence_lengths, rng=st.randoms())
def test_number_of_rows_does_not_depend_on_order(lengths: list[int], sequence_length: int, rng, packing: str) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    rows = pack(np.array(shuffled), sequence_length, packing)
    assert count_rows(np.array(lengths), sequence_length, packing) == len(rows)


@given(lengths_lists, sequence_lengths)
def test_concatenating_leaves_room_in_the_last_row_only(lengths: list[int], sequence_length: int) -> None:
    rows = pack(np.array(lengths), sequence_length, CONCATENATE)
    used = np.add.reduceat(rows.length, rows.piece_starts[:-1])
    assert (used[:-1] == sequence_length).all()
    assert (np.diff(rows.document) >= 0).all()  # the documents in their order


@given(st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_assignment_is_best_fit_decreasing(pieces: list[int]) -> None:
    capacity = 16
    row_of, num_rows = assign_rows(np.array(pieces), capacity)
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):  # the textbook algorithm, by exhaustive search
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms[rooms.index(min(fitting))] -= piece
        else:
            rooms.append(capacity - piece)
    fills = np.bincount(row_of, weights=pieces, minlength=num_rows)
    assert sorted(capacity - room for room in rooms) == sorted(fills.astype(int).tolist())


def test_pieces_start_at_the_first_token_and_overlap_by_one() -> None:
    document, start, length = cut(np.array([11, 5, 2]), 5)
    assert document.tolist() == [0, 0, 1, 2]
    assert start.tolist() == [0, 5, 0, 0]
    assert length.tolist() == [5, 5, 4, 1]
