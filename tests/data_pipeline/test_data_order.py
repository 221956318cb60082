"""The order is a pure function: whoever asks, in whatever pieces, gets the same stream."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.keyed import keyed_permutation
from data_pipeline.order import Addition, LaneOrder, Place, SequentialOrder, lane_positions

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


@st.composite
def grown_orders(draw: st.DrawFn) -> tuple[np.ndarray, int, int, list[int], list[int]]:
    """(rows, lanes, segments at first, segments after each addition, samples at which they join)."""
    first = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    added = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=3))
    sizes = np.cumsum([len(first), *(len(rows) for rows in added)]).tolist()
    joins = sorted(draw(st.lists(st.integers(0, 90), min_size=len(added), max_size=len(added))))
    rows = np.array(first + [count for part in added for count in part])
    return rows, draw(st.integers(1, len(first))), sizes[0], sizes[1:], joins


def grown(rows: np.ndarray, lanes: int, first: int, sizes: list[int], joins: list[int]) -> LaneOrder:
    additions = [Addition(size, lane_positions(sample, lanes)) for size, sample in zip(sizes, joins, strict=True)]
    return LaneOrder(rows, lanes, 3, "train", additions, first)


@settings(max_examples=60)
@given(grown_orders(), st.integers(0, 200))
def test_added_segments_leave_the_past_alone_and_join_each_epoch_once(
    setting: tuple[np.ndarray, int, int, list[int], list[int]], k: int
) -> None:
    rows, lanes, first, sizes, joins = setting
    horizon = 100 + lanes * 4 * int(rows.sum())
    places = list(map(grown(*setting).locate, range(horizon)))
    assert places[k:] == list(map(grown(*setting).locate, range(k, horizon)))

    for number, join in enumerate(joins):  # what came before a join knows nothing of it
        before = grown(rows, lanes, first, sizes[:number], joins[:number])
        assert places[:join] == [before.locate(g) for g in range(join)]

    for epoch in range(min(place.epoch for place in places[-lanes:])):
        seen = Counter((p.segment, p.row) for p in places if p.epoch == epoch)
        size = max(p.segment for p in places if p.epoch == epoch) + 1
        assert size in (first, *sizes)
        assert seen == Counter((s, r) for s in range(size) for r in range(rows[s]))
    assert max(p.segment for p in places) == len(rows) - 1


def test_added_segments_join_soon_after_their_sample() -> None:
    rows = np.full(128, 4)
    order = grown(rows, 8, 64, [128], [80])
    places = [order.locate(g) for g in range(8 * 64)]
    assert max(p.segment for p in places[:80]) < 64
    # 10 of 32 positions a lane had gone; of what follows about 64 / (64 - 20) is new.
    new = [p.segment >= 64 for p in places[112:]]
    assert 0.5 < sum(new) / len(new) < 0.7
    assert all(p.epoch == 0 for p in places[: 4 * 64])


@given(orders(), st.integers(0, 100))
def test_next_segment_is_the_one_that_comes(setting: tuple[list[int], int, int], index: int) -> None:
    rows, lanes, seed = setting
    order = LaneOrder(np.array(rows), lanes, seed, "train")
    place = order.locate(index)
    following = order.next_segment(place)
    assert following is not None
    assert following[0] == order.locate(index + following[1] * lanes)
    before = order.locate(index + (following[1] - 1) * lanes)
    assert (before.epoch, before.segment) == (place.epoch, place.segment)
