"""Layer patterns from shares: counts, even spread, and agreement with Megatron-Core's allocation."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.ssm import mamba_hybrid_layer_allocation as allocation

from pretrain.models.hybrid.pattern import LayerRatios, largest_remainder, spread_layers

SYMBOLS = {"mamba2": "M", "mamba1": "m", "attention": "*", "mlp": "-", "moe": "E"}
PUBLISHED = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


def ratios(num_layers: int, **shares: float) -> LayerRatios:
    return LayerRatios(num_layers=num_layers, shares=shares)


def faults(num_layers: int, **shares: float) -> dict[str, tuple[object, str, str]]:
    found = ratios(num_layers, **shares).violations(SYMBOLS)
    return {field: (value, rule, fix) for field, value, rule, fix in found}


def test_the_published_shares_give_the_published_pattern():
    assert ratios(56, mamba2=0.43, attention=0.07, mlp=0.5).pattern(SYMBOLS) == PUBLISHED
    assert ratios(56, mlp=0.5, attention=0.07, mamba2=0.43).pattern(SYMBOLS) == PUBLISHED


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"mamba2": 1.0}, "MMMMMMMM"),
        ({"mamba2": 0.5, "mlp": 0.5}, "M-M-M-M-"),
        ({"mamba2": 0.5, "moe": 0.5, "mlp": 0.0}, "MEMEMEME"),
        ({"mamba2": 0.5, "mlp": 0.25, "moe": 0.25}, "M-MEM-ME"),
        ({"mamba2": 0.25, "mamba1": 0.25, "mlp": 0.5}, "M-m-M-m-"),
        ({"mamba2": 0.875, "attention": 0.125}, "MMMM*MMM"),
        ({"mamba1": 0.75, "attention": 0.25}, "mm*mm*mm"),
    ],
)
def test_small_patterns_are_those_one_would_write_by_hand(shares, expected):
    assert ratios(8, **shares).pattern(SYMBOLS) == expected


# ---- properties

weights = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any)


@settings(max_examples=150, deadline=None)
@given(weights=weights, total=st.integers(1, 120))
def test_counts_are_within_one_of_the_share_and_add_up(weights, total):
    shares = {name: weight / sum(weights) for name, weight in zip(SYMBOLS, weights, strict=True) if weight}
    counts = largest_remainder(shares, total)
    assert sum(counts.values()) == total
    for name, share in shares.items():
        assert abs(counts[name] - share * total) < 1 + 1e-9
    missed = {name: shares[name] * total - counts[name] for name in shares}
    assert max(missed.values()) - min(missed.values()) <= 1 + 1e-9  # no kind is favoured over one with more left


@settings(max_examples=200, deadline=None)
@given(
    mamba2=st.integers(0, 40),
    mamba1=st.integers(0, 20),
    mlp=st.integers(0, 40),
    moe=st.integers(0, 20),
    attention=st.integers(0, 20),
)
def test_layers_are_as_many_as_asked_for_and_evenly_spread(mamba2, mamba1, mlp, moe, attention):
    counts = {"M": mamba2, "m": mamba1, "*": attention, "-": mlp, "E": moe}
    pattern = spread_layers(counts)
    assert {symbol: pattern.count(symbol) for symbol in counts} == counts
    assert pattern == spread_layers(counts)
    runs = [len(run) for run in pattern.split("*")]
    assert max(runs) - min(runs) <= 1
    others = pattern.replace("*", "")
    merged = others.replace("m", "M").replace("E", "-")
    if mlp + moe:
        *before, after = [len(run) for run in merged.split("-")]
        assert max(before) - min(before) <= 1
        assert after == 0
    mixers, feed_forward = ("".join(s for s in others if s in kind) for kind in ("Mm", "-E"))
    for places, later in ((mixers, "m"), (feed_forward, "E")):
        first, *inner, last = [len(run) for run in places.split(later)] if later in places else [0, 0]
        assert not inner or max(inner) - min(inner) <= 1
        assert abs(first - last) <= 1


# ---- Megatron-Core


class Exact(int):
    """A whole number whose quotients are exact, so that Megatron's rule runs without rounding of floats."""

    def __sub__(self, other):
        return Exact(int(self) - int(other))

    def __truediv__(self, other):
        return Fraction(int(self), int(other))


def grid():
    return [
        (total, attention, mlp)
        for total in range(1, 41)
        for attention in range((total + 1) // 2)
        for mlp in range(total - attention + 1)
    ]


def ours(total: int, attention: int, mlp: int) -> str:
    return spread_layers({"M": total - attention - mlp, "*": attention, "-": mlp})


def test_the_rule_is_megatrons_in_exact_arithmetic():
    for total, attention, mlp in grid():
        shares = Fraction(attention, total), Fraction(mlp, total)
        theirs = "".join(allocation._allocate_auto(Exact(total), *shares))
        assert ours(total, attention, mlp) == theirs, (total, attention, mlp)


def test_megatrons_own_floats_differ_only_where_a_half_is_rounded():
    differ = 0
    for total, attention, mlp in grid():
        theirs = "".join(allocation.allocate_layers(total, attention / total, mlp / total))
        if theirs != ours(total, attention, mlp):
            others, mixers = total - attention, total - attention - mlp
            halves = [Fraction(k * others, attention + 1) for k in range(1, attention + 1)]
            halves += [Fraction(k * mixers, mlp) for k in range(1, mlp + 1)]
            assert any(half.denominator == 2 for half in halves), (total, attention, mlp)
            differ += 1
    assert 0 < differ < 0.15 * len(grid())


@pytest.mark.parametrize(("attention", "mlp"), [(0.08, 0.5), (0.07, 0.5), (0.1, 0.3), (0.25, 0.25), (0.0, 0.5)])
@pytest.mark.parametrize("total", [24, 40, 48, 56, 64])
def test_common_ratios_give_megatrons_pattern(total, attention, mlp):
    theirs = "".join(allocation.allocate_layers(total, attention, mlp))
    shares = {"mamba2": round(1 - attention - mlp, 6), "attention": attention, "mlp": mlp}
    pattern = ratios(total, **shares).pattern(SYMBOLS)
    if all(theirs.count(symbol) == pattern.count(symbol) for symbol in "M*-"):
        assert pattern == theirs
    else:  # each count rounded by itself there; the remainders decide here
        assert max(abs(theirs.count(symbol) - pattern.count(symbol)) for symbol in "M*-") == 1


# ---- rules


def test_good_ratios_have_no_violations():
    assert faults(56, mamba2=0.43, attention=0.07, mlp=0.5) == {}
    assert faults(3, attention=1.0) == {}
    assert faults(9, mamba2=1 / 3, mlp=1 / 3, attention=1 / 3) == {}
    assert faults(5, attention=0.4, mlp=0.6, moe=0.0) == {}


@pytest.mark.parametrize(
    ("num_layers", "shares", "field", "rule", "fix"),
    [
        (0, {"mamba2": 1.0}, "num_layers", "positive", "56"),
        (8, {"mamba2": 0.5, "mamba": 0.5}, "shares.mamba", "no such kind", "mamba2, mamba1, attention, mlp, moe"),
        (8, {"mamba2": 0.5, "mlp": 0.4}, "shares", "sum to 1, here 0.5 + 0.4 = 0.9", "mamba2: 0.555556, mlp: 0.444444"),
        (8, {}, "shares", "sum to 1", "mamba2: 0.43"),
        (8, {"mamba2": 0.97, "attention": 0.03}, "shares.attention", "at least one of 8 layers", "34"),
        (8, {"mamba2": 0.5, "attention": 0.5}, "shares.attention", "at most 3 can be spread", "0.375"),
    ],
)
def test_each_rule_names_field_and_fix(num_layers, shares, field, rule, fix):
    found = faults(num_layers, **shares)
    assert list(found) == [field]
    assert rule in found[field][1]
    assert fix in found[field][2]


def test_all_faults_of_the_values_are_reported_together():
    assert set(faults(-1, mamba2=1.5, mamba=0.25, mlp=float("nan"))) == {
        "num_layers",
        "shares.mamba2",
        "shares.mamba",
        "shares.mlp",
        "shares",
    }


def test_the_fix_for_a_share_without_a_layer_works():
    assert faults(34, mamba2=0.97, attention=0.03) == {}
    assert faults(33, mamba2=0.97, attention=0.03) == {}
    assert "shares.attention" in faults(16, mamba2=0.97, attention=0.03)
