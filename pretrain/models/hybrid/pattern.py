"""Layer patterns from shares of each kind of layer. Torch-free; in whole numbers, so the same everywhere.

The rule, for ``num_layers`` layers:

1. Counts: each share times ``num_layers``, rounded down; the layers left over go to the largest remainders (of equal
   ones, to the kind that stands first in the model's table of symbols).
2. Attention (``*``) is spread between the other layers: of n attention layers among m others, the k-th stands after
   round(k m / (n + 1)) of them, halves up. The n + 1 runs of others differ by at most one layer.
3. Feed-forward layers (``-`` and ``E``) take places among the layers that are no attention, each after its share of the
   sequence mixers: of n among m mixers, the k-th stands after round(k m / n) of them, halves up. The last follows the
   last mixer, and the runs of mixers before each of them differ by at most one.
4. Kinds that share places (``M`` and ``m``; ``-`` and ``E``): the n layers of the later kind take the middles of n
   equal parts of the p places, the k-th the place floor((2k - 1) p / (2n)), counted from 0.

Rules 2 and 3 are those of Megatron-Core (``allocate_layers`` in ``megatron.core.ssm.mamba_hybrid_layer_allocation``),
which the 8B Mamba-2-Hybrid of arXiv 2406.07887 was laid out with. They differ in three things: Megatron adds up floats,
so its halves fall either way where this rule rounds up; it rounds each count by itself (to even), so the rest is always
Mamba-2; and where there is not a layer more of the others than of attention, it puts attention layers side by side,
which is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pretrain.nn.mixer_config import Violation

ATTENTION = "*"
FEED_FORWARD = "-E"
"""Symbols of layers that work on every token alone. Those that are neither attention nor one of these mix tokens."""

SUM_TOLERANCE = 1e-5
"""How far the sum of all shares may be from 1."""


@dataclass(frozen=True, kw_only=True)
class LayerRatios:
    """A number of layers and the share of each kind, evenly spread (see the head of this module).

    Attributes:
        num_layers: layers of the whole model.
        shares: share of each kind, by the name of its field in the model (``mamba2: 0.43``); they sum to 1.
    """

    num_layers: int
    shares: dict[str, float]

    def pattern(self, symbols: Mapping[str, str]) -> str:
        """The pattern of valid ratios; ``symbols``: symbol of each kind, by its name."""
        counts = self.counts(symbols)
        return spread_layers({symbols[name]: count for name, count in counts.items()})

    def counts(self, names: Iterable[str]) -> dict[str, int]:
        """Layers of each kind that has a share, in the order of ``names``."""
        return largest_remainder({name: self.shares[name] for name in names if self.shares.get(name)}, self.num_layers)

    def violations(self, symbols: Mapping[str, str]) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix); ``symbols`` as in :meth:`pattern`."""
        faults = list(self._value_violations(symbols))
        yield from faults
        if faults:
            return
        counts = self.counts(symbols)
        for name, count in counts.items():
            if not count:
                share = self.shares[name]
                fix = f"set num_layers to {math.ceil(1 / share)} or more, a larger share, or 0 for no such layers"
                yield f"shares.{name}", share, f"must give at least one of {self.num_layers} layers", fix
        attention = sum(count for name, count in counts.items() if symbols[name] == ATTENTION)
        most = (self.num_layers - 1) // 2
        if most < attention < self.num_layers:
            name = next(name for name in counts if symbols[name] == ATTENTION)
            rule = (
                f"gives {attention} attention layers of {self.num_layers}; at most {most} can be spread"
                " so that other layers stand before, between and after them"
            )
            fix = f"set {most / self.num_layers:.3g} or less (the rest to others), or give the layers as a pattern"
            yield f"shares.{name}", self.shares[name], rule, fix

    def _value_violations(self, symbols: Mapping[str, str]) -> Iterator[Violation]:
        if self.num_layers < 1:
            yield "num_layers", self.num_layers, "must be positive", "set the number of layers, for example 56"
        for name, share in self.shares.items():
            if name not in symbols:
                yield f"shares.{name}", share, "no such kind of layer", f"use the kinds {', '.join(symbols)}"
            elif not 0 <= share <= 1:
                yield f"shares.{name}", share, "must lie between 0 and 1", "set a share of the layers, for example 0.5"
        total = sum(self.shares.values())
        if not abs(total - 1) <= SUM_TOLERANCE:
            found = " + ".join(f"{share:g}" for share in self.shares.values()) or "none"
            yield "shares", self.shares, f"must sum to 1, here {found} = {total:g}", _sum_fix(self.shares, total)


def largest_remainder(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to ``total`` in the proportions of ``shares`` (positive, taken as the decimals they are
    written as): each quota rounded down, then one more for the largest remainders, the first of equal ones.
    """
    exact = {name: Fraction(repr(share)) for name, share in shares.items()}
    quotas = {name: share * total / sum(exact.values()) for name, share in exact.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def spread_layers(counts: Mapping[str, int]) -> str:
    """The evenly spread pattern with so many layers of each symbol, by rules 2 to 4 at the head of this module."""
    attention = counts.get(ATTENTION, 0)
    mixers = _mixed({symbol: n for symbol, n in counts.items() if symbol != ATTENTION and symbol not in FEED_FORWARD})
    feed_forward = _mixed({symbol: counts[symbol] for symbol in FEED_FORWARD if symbol in counts})
    n = len(feed_forward)
    others = _insert(mixers, feed_forward, [_rounded(k * len(mixers), n) for k in range(1, n + 1)])
    spread = [_rounded(k * len(others), attention + 1) for k in range(1, attention + 1)]
    return "".join(_insert(others, [ATTENTION] * attention, spread))


def _rounded(numerator: int, denominator: int) -> int:
    """numerator / denominator (not negative) to the nearest whole number, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _insert(base: Sequence[str], added: Sequence[str], after: Sequence[int]) -> list[str]:
    """``base`` with the i-th of ``added`` following the first ``after[i]`` (not decreasing) of its elements."""
    result: list[str] = []
    start = 0
    for symbol, stop in zip(added, after, strict=True):
        result += [*base[start:stop], symbol]
        start = stop
    return [*result, *base[start:]]


def _mixed(counts: Mapping[str, int]) -> list[str]:
    """Kinds that share places: the first fills them, each later one takes evenly spread ones from it (rule 4)."""
    symbols = [symbol for symbol, count in counts.items() if count]
    if not symbols:
        return []
    first, *later = symbols
    places = [first] * sum(counts.values())
    for symbol in later:
        free = [i for i, taken in enumerate(places) if taken == first]
        n = counts[symbol]
        for k in range(1, n + 1):
            places[free[(2 * k - 1) * len(free) // (2 * n)]] = symbol
    return places


def _sum_fix(shares: Mapping[str, float], total: float) -> str:
    if not total > 0:
        return "give each kind its share, for example {mamba2: 0.43, attention: 0.07, mlp: 0.5}"
    scaled = ", ".join(f"{name}: {share / total:.6g}" for name, share in shares.items())
    return f"for these proportions set {scaled}; shares of the chosen model that you do not want are set to 0"
