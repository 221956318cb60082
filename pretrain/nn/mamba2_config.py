"""Configuration, rules and cost of the Mamba-2 mixer. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.nn.cost import Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, nearest_divisors, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.mamba2 import Mamba2Mixer
    from pretrain.parallel.layers import ParallelLayers


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2 (Dao and Gu, arXiv 2405.21060).

    Attributes:
        expand: inner width as a multiple of the model's.
        head_dim, state_dim: features and state size of a head.
        groups: groups of heads that share B and C.
        conv_kernel: taps of the causal convolution.
        chunk_size: chunk length of the SSD algorithm, in tokens (speed only, not the result).
    """

    label: ClassVar[str] = "Mamba-2"

    expand: int = 2
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128

    def inner(self, width: int) -> int:
        """Features inside the mixer, all heads together."""
        return self.expand * width

    def heads(self, width: int) -> int:
        """Number of heads."""
        return self.inner(width) // self.head_dim

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        names = ("expand", "head_dim", "state_dim", "groups", "conv_kernel", "chunk_size")
        defaults = Mamba2Config()
        broken = {v[0]: v for v in not_positive(self, {name: getattr(defaults, name) for name in names})}
        yield from broken.values()
        if broken.keys() & {"expand", "head_dim", "groups"}:
            return
        inner = self.inner(width)
        if inner % self.head_dim:
            fix = f"set {nearest_divisors(inner, self.head_dim)}"
            yield "head_dim", self.head_dim, f"must divide expand * width ({inner})", fix
        elif self.heads(width) % self.groups:
            fix = f"set {nearest_divisors(self.heads(width), self.groups)}"
            heads = f"{self.heads(width)} = expand * width / head_dim"
            yield "groups", self.groups, f"must divide the number of Mamba-2 heads ({heads})", fix

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Heads and groups are split."""
        note = " (a single group is normalised as a whole and would need an exchange in every layer)"
        yield from uneven_share("groups", self.groups, tensor_parallel, note if self.groups == 1 else "")
        if self.heads(width) % tensor_parallel:
            heads = f"{self.heads(width)} = expand * width / head_dim"
            rule = f"the number of heads ({heads}) must be a multiple of the {tensor_parallel} tensor-parallel ranks"
            yield "head_dim", self.head_dim, rule, "change width or head_dim, or use fewer ranks"

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Projections and the four products of chunked SSD (arXiv 2405.21060, section 6).

        Per token and chunk of Q: C B^T (2 Q N G), its product with the inputs (2 Q inner), the chunk's state
        (2 N inner) and the state's output (2 N inner). Carrying states between chunks is left out (a factor Q smaller).
        """
        inner, heads, grouped = self.inner(place.width), self.heads(place.width), self.groups * self.state_dim
        chunk = min(self.chunk_size, sequence_length)
        packed = inner + 2 * grouped
        projections = linear_cost(place.width, inner + packed + heads) + linear_cost(inner, place.width)
        own_parameters = packed * (self.conv_kernel + 1) + 3 * heads + inner
        return projections + Cost(own_parameters, 2 * chunk * (grouped + inner) + 4 * self.state_dim * inner)

    def build(self, layers: ParallelLayers, place: Place) -> Mamba2Mixer:
        """The module."""
        from pretrain.nn.mamba2 import Mamba2Mixer

        return Mamba2Mixer(layers, place.width, self, norm_eps=place.norm_eps)
