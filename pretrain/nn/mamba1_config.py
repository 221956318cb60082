"""Configuration, rules and cost of the Mamba-1 mixer. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.nn.cost import FP32, Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.mamba1 import Mamba1Mixer
    from pretrain.parallel.layers import ParallelLayers


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Mamba (Gu and Dao, arXiv 2312.00752).

    Attributes:
        expand: inner width as a multiple of the model's.
        state_dim: states of each inner channel.
        conv_kernel: taps of the causal convolution.
        dt_rank: features that the step sizes of all channels are made from (None: width / 16, rounded up).
        chunk_size: positions between states that are kept for the backward pass (speed and memory, not the result).
        proj_bias: input and output projections have a bias.
        conv_bias: the convolution has a bias.
    """

    label: ClassVar[str] = "Mamba-1"

    expand: int = 2
    state_dim: int = 16
    conv_kernel: int = 4
    dt_rank: int | None = None
    chunk_size: int = 32
    proj_bias: bool = False
    conv_bias: bool = True

    def inner(self, width: int) -> int:
        """Channels inside the mixer."""
        return self.expand * width

    def rank(self, width: int) -> int:
        """Features that step sizes are made from, default filled in."""
        return -(-width // 16) if self.dt_rank is None else self.dt_rank

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        names = ("expand", "state_dim", "conv_kernel", "chunk_size")
        defaults = Mamba1Config()
        yield from not_positive(self, {name: getattr(defaults, name) for name in names} | {"dt_rank": self.rank(width)})
        if self.expand > 0 and self.dt_rank is not None and self.dt_rank > self.inner(width):
            rule = f"must not be more than the inner channels ({self.inner(width)} = expand * width)"
            yield "dt_rank", self.dt_rank, rule, f"set dt_rank to null for {-(-width // 16)} (width / 16)"

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Inner channels are split."""
        inner = self.inner(width)
        for _, _, rule, _ in uneven_share("expand", inner, tensor_parallel):
            yield (
                "expand",
                self.expand,
                f"expand * width ({inner}) {rule}",
                "change width or expand, or use fewer ranks",
            )

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Projections and the reading of the states (2 N for each channel).

        The recurrence itself is element-wise and left out: about 7 operations for each of the N * inner states. Kept
        for the backward pass are the inputs of the projections and of the scan, which computes step sizes, states of
        a chunk and the ungated output again, and the state entering each chunk.
        """
        width, inner, rank, states = place.width, self.inner(place.width), self.rank(place.width), self.state_dim
        projections = linear_cost(width, 2 * inner, self.proj_bias) + linear_cost(inner, width, self.proj_bias)
        projections += linear_cost(inner, rank + 2 * states) + linear_cost(rank, inner)
        own_parameters = inner * (self.conv_kernel + self.conv_bias + states + 2)
        kept_states = (-(-sequence_length // self.chunk_size) + 1) * inner * states * FP32
        # The norm's output; gate and input; after the convolution; step features, B, C; raw steps; the output.
        values = width + 2 * inner + inner + rank + 2 * states + inner + inner
        return projections + Cost(
            own_parameters,
            2 * states * inner,
            activation_bytes_per_token=values * bytes_per_value + kept_states / sequence_length,
            state_bytes=inner * states * FP32 + (self.conv_kernel - 1) * inner * bytes_per_value,
        )

    def build(self, layers: ParallelLayers, place: Place) -> Mamba1Mixer:
        """The module."""
        from pretrain.nn.mamba1 import Mamba1Mixer

        return Mamba1Mixer(layers, place.width, self)
