"""The order is a pure function: whoever asks, in whatever pieces, gets the same stream."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.keyed import keyed_permutation
from data_pipeline.order import LaneOrder, Place, SequentialOrder

rows_lists = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], int, int]:
    rows = draw(rows_lists)
    return rows, draw(st.integers(1, len(rows))), draw(st.integers(0, 5))


def stream(rows: list[int], lanes: int, seed: int, indices: list[int]) -> list[Place]:
    order = LaneOrder(np.array(rows), lanes, seed, "train")
    return [order.locate(index) for index in indices]


@settings(max_examples=30)
@given(orders(), st.integers(0, 120), st.randoms())
def test_place_depends_on_the_index_alone(setting: tuple[list[int], int, int], k: int, rng) -> None:
    n = 120
    whole = stream(*setting, list(range(n)))
    assert whole == stream(*setting, list(range(k))) + stream(*setting, list(range(k, n)))
    indices = rng.sample(range(n), n)
    assert [whole[index] for index in indices] == stream(*setting, indices)


@given(orders())
def test_lanes_together_read_every_row_once_an_epoch(setting: tuple[list[int], int, int]) -> None:
    rows, lanes, _ = setting
    horizon = lanes * 4 * (max(rows) * len(rows))
    places = stream(*setting, list(range(horizon)))
    for epoch in range(3):
        seen = Counter((place.segment, place.row) for place in places if place.epoch == epoch)
        assert seen == Counter((s, r) for s, count in enumerate(rows) for r in range(count))


@given(orders())
def test_lane_reads_whole_segments_one_after_another(setting: tuple[list[int], int, int]) -> None:
    rows, lanes, _ = setting
    for lane in range(lanes):
        own = stream(*setting, list(range(lane, 60 * lanes, lanes)))
        assert all(place.lane == lane for place in own)
        for before, after in pairwise(own):
            inside = (before.epoch, before.segment) == (after.epoch, after.segment)
            if inside and before.row + 1 < rows[before.segment]:
                assert after.row == before.row + 1
            else:
                assert before.row == rows[before.segment] - 1
                assert after.row == 0
                assert after.epoch >= before.epoch


def test_longer_share_goes_round_the_lanes() -> None:
    # 9 segments on 4 lanes: one lane has 3. With fixed shares it would fall ever further behind the others.
    order = LaneOrder(np.full(9, 10), 4, 0, "train")
    epochs = [order.locate(4 * 10 * 9 * 10 + lane).epoch for lane in range(4)]
    assert max(epochs) - min(epochs) <= 1


def test_seed_and_epoch_change_the_order() -> None:
    rows = np.full(32, 1)
    first = [LaneOrder(rows, 1, 0, "train").locate(i).segment for i in range(64)]
    second = [LaneOrder(rows, 1, 1, "train").locate(i).segment for i in range(32)]
    assert first[:32] != first[32:]
    assert first[:32] != second
    assert first[:32] != sorted(first[:32])


def test_more_lanes_than_segments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_lanes is 4.*3 segments.*lower num_lanes"):
        LaneOrder(np.ones(3, dtype=int), 4, 0, "train")


@given(rows_lists)
def test_sequential_order_is_stored_order(rows: list[int]) -> None:
    order = SequentialOrder(np.array(rows))
    places = [order.locate(index) for index in range(order.num_samples)]
    assert [(p.segment, p.row) for p in places] == [(s, r) for s, n in enumerate(rows) for r in range(n)]
    with pytest.raises(IndexError):
        order.locate(order.num_samples)


def test_keyed_permutation_is_fixed_for_good() -> None:
    # A change here reorders every run that is resumed afterwards.
    assert keyed_permutation(8, 1234, "train", 0).tolist() == [1, 5, 6, 3, 4, 7, 0, 2]
    assert sorted(keyed_permutation(1000, "key").tolist()) == list(range(1000))
