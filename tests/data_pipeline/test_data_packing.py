"""Cutting and packing: every target once, no row too long, no more rows than needed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import assign_rows, count_rows, cut, pack

lengths_lists = st.lists(st.integers(2, 70), min_size=1, max_size=40)
sequence_lengths = st.integers(2, 24)


@given(lengths_lists, sequence_lengths)
def test_every_target_lies_in_exactly_one_row(lengths: list[int], sequence_length: int) -> None:
    rows = pack(np.array(lengths), sequence_length)
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


@given(lengths_lists, sequence_lengths, st.randoms())
def test_number_of_rows_does_not_depend_on_order(lengths: list[int], sequence_length: int, rng) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    assert count_rows(np.array(lengths), sequence_length) == len(pack(np.array(shuffled), sequence_length))


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
