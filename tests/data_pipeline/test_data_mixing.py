"""Mixing: exact shares, in closed form, whoever asks."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixing import WHEEL_SLOTS, Mixture, Phase, phase_violations, wheel

weight_lists = st.lists(st.floats(0, 1e3) | st.integers(0, 5), min_size=1, max_size=6).filter(
    lambda weights: sum(weights) > 1e-3
)


@settings(max_examples=25)
@given(weight_lists)
def test_every_prefix_of_a_wheel_holds_each_share_to_within_one(weights: list[float]) -> None:
    slots = wheel(weights)
    counts = np.cumsum(slots[:, None] == np.arange(len(weights)), axis=0)
    exact = np.arange(1, WHEEL_SLOTS + 1)[:, None] * (np.array(weights) / sum(weights))
    assert np.abs(counts - exact).max() < 1 + 1e-9


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    lanes = draw(st.sampled_from([1, 2, 4, 6, 8]))
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    own = [draw(st.sampled_from([d for d in range(1, lanes + 1) if lanes % d == 0])) for _ in names]
    starts = [0, *sorted(draw(st.sets(st.integers(1, 200), max_size=3)))]
    weights = st.fixed_dictionaries({name: st.sampled_from([0, 1, 2, 0.3]) for name in names})
    phases = [Phase(start, draw(weights.filter(lambda w: sum(w.values()) > 0))) for start in starts]
    return Mixture(names, own, lanes, phases)


@settings(max_examples=25)
@given(mixtures())
def test_each_source_lane_is_read_in_order_without_a_gap(mixture: Mixture) -> None:
    """The closed form against counting."""
    following: dict[tuple[int, int], int] = defaultdict(int)
    counts = [0] * 3
    for index in range(250):
        assert mixture.counts(index) == counts[: len(mixture.counts(index))]
        place = mixture.locate(index)
        assert place.position == following[place.source, place.lane]
        following[place.source, place.lane] += 1
        counts[place.source] += 1
    for source in range(len(mixture.counts(0))):
        for lane, position in enumerate(mixture.source_positions(source, 250)):
            assert position == following[source, lane]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 10**9))
def test_shares_hold_at_any_sample_number(weights: list[int], index: int) -> None:
    lanes = 16
    names = [str(number) for number in range(len(weights))]
    mixture = Mixture(
        names, [lanes] * len(names), lanes, [Phase(0, dict(zip(names, map(float, weights), strict=True)))]
    )
    counts = mixture.counts(index)
    assert sum(counts) == index
    # Less than one sample per lane and wheel that is under way, plus what rounding leaves on every full wheel.
    allowed = lanes * (1 + index / lanes / WHEEL_SLOTS)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - index * weight / sum(weights)) <= allowed


def test_a_batch_of_neighbours_holds_the_mix() -> None:
    mixture = Mixture(["a", "b"], [64, 64], 64, [Phase(0, {"a": 1.0, "b": 1.0})])
    for first in range(0, 64 * 50, 64):
        sources = [mixture.locate(g).source for g in range(first, first + 64)]
        assert abs(sum(sources) - 32) <= 1


def test_weights_change_at_their_sample() -> None:
    phases = [Phase(0, {"a": 1.0}), Phase(100, {"b": 1.0}), Phase(150, {"a": 1.0, "b": 3.0})]
    mixture = Mixture(["a", "b"], [8, 8], 8, phases)
    sources = [mixture.locate(g).source for g in range(150 + 8 * WHEEL_SLOTS)]
    assert set(sources[:100]) == {0}
    assert set(sources[100:150]) == {1}
    assert sum(sources[150:]) == 8 * WHEEL_SLOTS * 3 // 4


@pytest.mark.parametrize(
    ("phases", "where"),
    [
        ([], "phases"),
        ([Phase(5, {"a": 1.0})], "phases"),
        ([Phase(0, {"a": 1.0}), Phase(0, {"b": 1.0})], "phases"),
        ([Phase(0, {"a": math.nan})], "phases[0].weights.a"),
        ([Phase(0, {"a": -1.0, "b": 1.0})], "phases[0].weights.a"),
        ([Phase(0, {"a": 0.0})], "phases[0].weights"),
        ([Phase(0, {"a": 1.0, "x": 1.0})], "phases[0].weights.x"),
        ([Phase(0, {"a": 1.0, "b": 1e-5})], "phases[0].weights.b"),
    ],
)
def test_faulty_phases_are_named(phases: list[Phase], where: str) -> None:
    assert where in [field for field, *_ in phase_violations(["a", "b"], phases)]


def test_many_small_weights_that_find_no_slot_are_told() -> None:
    names = [f"s{number}" for number in range(64)]
    weights = dict.fromkeys(names, 1 / 8000) | {"s0": 1.0}
    (violation,) = phase_violations(names, [Phase(0, weights)])
    assert violation[0] == "phases[0].weights"
    assert "no slot" in violation[2]
