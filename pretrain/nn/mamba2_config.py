"""Configuration, rules and cost of the Mamba-2 mixer. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.nn.cost import FP32, Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, nearest_divisors, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.mamba2 import Mamba2Mixer
    from pretrain.parallel.layers import ParallelLayers


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2 (Dao and Gu, arXiv 2405.21060).

    Attributes:
        expand: inner width as a multiple of the model's, used when ``num_heads`` is None.
        num_heads: heads; the inner width is then ``num_heads * head_dim``.
        head_dim, state_dim: features and state size of a head.
        groups: groups of heads that share B and C.
        conv_kernel: taps of the causal convolution.
        chunk_size: chunk length of the SSD algorithm, in tokens (speed only, not the result).
        norm_groups: equal parts of the inner features that the output norm treats each by itself (None: ``groups``).
        dt_limit: least and largest step size; None for no limit.
        proj_bias: input and output projections have a bias.
        conv_bias: the convolution has a bias.
    """

    label: ClassVar[str] = "Mamba-2"

    expand: int = 2
    num_heads: int | None = None
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_groups: int | None = None
    dt_limit: tuple[float, float] | None = None
    proj_bias: bool = False
    conv_bias: bool = True

    @property
    def normed_groups(self) -> int:
        """Groups of the output norm, default filled in."""
        return self.groups if self.norm_groups is None else self.norm_groups

    def inner(self, width: int) -> int:
        """Features inside the mixer, all heads together."""
        return self.expand * width if self.num_heads is None else self.num_heads * self.head_dim

    def heads(self, width: int) -> int:
        """Number of heads."""
        return self.inner(width) // self.head_dim

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        names = ("expand", "head_dim", "state_dim", "groups", "conv_kernel", "chunk_size")
        defaults = Mamba2Config()
        examples = {name: getattr(defaults, name) for name in names} | {"norm_groups": 1, "num_heads": 8}
        broken = {v[0]: v for v in not_positive(self, examples)}
        yield from broken.values()
        if self.dt_limit is not None and not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            rule = "must be two step sizes, the least (0 or more) and the largest"
            yield "dt_limit", self.dt_limit, rule, "for example [0.0, 0.5], or null for no limit"
        if broken.keys() & {"expand", "num_heads", "head_dim", "groups"}:
            return
        inner = self.inner(width)
        if inner % self.head_dim:
            fix = f"set {nearest_divisors(inner, self.head_dim)}"
            yield "head_dim", self.head_dim, f"must divide expand * width ({inner})", fix
        elif self.heads(width) % self.groups:
            fix = f"set {nearest_divisors(self.heads(width), self.groups)}"
            rule = f"must divide the number of Mamba-2 heads ({self._heads_text(width)})"
            yield "groups", self.groups, rule, fix
        if self.norm_groups is not None and self.norm_groups > 0 and inner % self.norm_groups:
            fix = f"set {nearest_divisors(inner, self.norm_groups)}, or null for groups"
            yield "norm_groups", self.norm_groups, f"must divide the inner width ({inner})", fix

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Heads and groups are split, and so are the groups of the output norm."""
        note = " (a single group is normalised as a whole and would need an exchange in every layer)"
        yield from uneven_share("groups", self.groups, tensor_parallel, note if self.groups == 1 else "")
        if self.norm_groups is not None:
            note = note if self.norm_groups == 1 else ""
            yield from uneven_share("norm_groups", self.norm_groups, tensor_parallel, note)
        if self.heads(width) % tensor_parallel:
            ranks = f"the {tensor_parallel} tensor-parallel ranks"
            if self.num_heads is not None:
                yield from uneven_share("num_heads", self.num_heads, tensor_parallel)
                return
            rule = f"the number of heads ({self._heads_text(width)}) must be a multiple of {ranks}"
            yield "head_dim", self.head_dim, rule, "change width or head_dim, or use fewer ranks"

    def _heads_text(self, width: int) -> str:
        return f"{self.heads(width)}" + (" = expand * width / head_dim" if self.num_heads is None else "")

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Projections and the four products of chunked SSD (arXiv 2405.21060, section 6).

        Per token and chunk of Q: C B^T (2 Q N G), its product with the inputs (2 Q inner), the chunk's state
        (2 N inner) and the state's output (2 N inner). Carrying states between chunks is left out (a factor Q smaller).
        Kept for the backward pass are the inputs of the projections, of the convolution, of SSD and of the norm, step
        sizes in fp32 before and after softplus (and the limit), and the state entering each chunk.
        """
        inner, heads, grouped = self.inner(place.width), self.heads(place.width), self.groups * self.state_dim
        chunk = min(self.chunk_size, sequence_length)
        packed = inner + 2 * grouped
        projections = linear_cost(place.width, inner + packed + heads, self.proj_bias)
        projections += linear_cost(inner, place.width, self.proj_bias)
        states = inner * self.state_dim * FP32
        values = place.width + (inner + packed + heads) + packed + inner + inner
        steps = heads * (2 if self.dt_limit is None else 3) + self.normed_groups
        chunks = -(-sequence_length // self.chunk_size)
        return projections + Cost(
            packed * (self.conv_kernel + self.conv_bias) + 3 * heads + inner,
            2 * chunk * (grouped + inner) + 4 * self.state_dim * inner,
            activation_bytes_per_token=values * bytes_per_value
            + steps * FP32
            + (chunks + 1) * states / sequence_length,
            state_bytes=states + (self.conv_kernel - 1) * packed * bytes_per_value,
        )

    def build(self, layers: ParallelLayers, place: Place) -> Mamba2Mixer:
        """The module."""
        from pretrain.nn.mamba2 import Mamba2Mixer

        return Mamba2Mixer(layers, place.width, self, norm_eps=place.norm_eps)
