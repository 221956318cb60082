"""Configuration, rules and cost of attention. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.nn.cost import Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, nearest_divisors, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.attention import Attention
    from pretrain.parallel.layers import ParallelLayers


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245).

    Attributes:
        num_heads, num_kv_heads: query and key/value heads (None: as many as query heads).
        head_dim: features of a head (None: width / num_heads).
        rope_theta: base of the rotary position embedding; None for no position embedding.
    """

    label: ClassVar[str] = "attention"

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None

    @property
    def kv_heads(self) -> int:
        """Key/value heads, default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def features(self, width: int) -> int:
        """Features of a head, default filled in."""
        return width // self.num_heads if self.head_dim is None else self.head_dim

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        examples = {"num_heads": 8, "num_kv_heads": self.num_heads, "head_dim": 64, "rope_theta": 10000.0}
        broken = {violation[0]: violation for violation in not_positive(self, examples)}
        yield from broken.values()
        if broken.keys() & {"num_heads", "num_kv_heads", "head_dim"}:
            return
        if self.head_dim is None and width % self.num_heads:
            fix = f"set {nearest_divisors(width, self.num_heads)} heads, or set head_dim"
            yield "num_heads", self.num_heads, f"must divide width ({width}) when head_dim is not set", fix
        elif self.rope_theta is not None and self.features(width) % 2:
            found = self.features(width)
            fix = f"set head_dim to {found + 1}, or rope_theta to null"
            yield "head_dim", found, "must be even with a rotary embedding (rope_theta)", fix
        if self.num_heads % self.kv_heads:
            fix = f"set {nearest_divisors(self.num_heads, self.kv_heads)}"
            yield "num_kv_heads", self.kv_heads, f"must divide num_heads ({self.num_heads})", fix

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Heads are split."""
        yield from uneven_share("num_heads", self.num_heads, tensor_parallel)
        yield from uneven_share("num_kv_heads", self.kv_heads, tensor_parallel)

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Projections, scores and weighted values, every query against every key."""
        heads, kv_heads, features = self.num_heads, self.kv_heads, self.features(place.width)
        projections = linear_cost(place.width, (heads + 2 * kv_heads) * features)
        projections += linear_cost(heads * features, place.width)
        return projections + Cost(0, 4 * sequence_length * heads * features)

    def build(self, layers: ParallelLayers, place: Place) -> Attention:
        """The module."""
        from pretrain.nn.attention import Attention

        return Attention(layers, place.width, self)
