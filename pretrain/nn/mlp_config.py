"""Configuration, rules and cost of the MLP. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pretrain.nn.cost import Cost, linear_cost
from pretrain.nn.mixer_config import Place, Violation, no_hidden_feature, not_positive, uneven_share

if TYPE_CHECKING:
    from pretrain.nn.mlp import MLP
    from pretrain.parallel.layers import ParallelLayers

Activation = Literal["swiglu", "gelu", "relu2"]


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Position-wise MLP.

    Attributes:
        ratio: hidden features as a multiple of the model's width, used when ``hidden_size`` is None.
        hidden_size: features between the linear layers (each of the two halves for ``swiglu``).
        activation: ``swiglu`` (gated, three matrices), ``gelu`` or ``relu2`` (squared ReLU).
        bias: whether both linear layers have one.
    """

    label: ClassVar[str] = "MLP"

    ratio: float = 4.0
    hidden_size: int | None = None
    activation: Activation = "swiglu"
    bias: bool = False

    def hidden(self, width: int) -> int:
        """Hidden features, default filled in."""
        return round(self.ratio * width) if self.hidden_size is None else self.hidden_size

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        yield from not_positive(self, {"ratio": 4.0} if self.hidden_size is None else {"hidden_size": 2048})
        yield from no_hidden_feature(self, width)

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """Hidden features are split."""
        yield from uneven_share("hidden_size", self.hidden(width), tensor_parallel)

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Two matrices, three when gated. Kept for the backward pass: the input of both linear layers (``width``,
        ``hidden``) and of the activation; gated, also the activated gate.
        """
        width, hidden = place.width, self.hidden(place.width)
        inputs = (2 if self.activation == "swiglu" else 1) * hidden
        kept = width + inputs + hidden + (hidden if self.activation == "swiglu" else 0)
        projections = linear_cost(width, inputs, self.bias) + linear_cost(hidden, width, self.bias)
        return projections + Cost(activation_bytes_per_token=bytes_per_value * kept)

    def build(self, layers: ParallelLayers, place: Place) -> MLP:
        """The module."""
        from pretrain.nn.mlp import MLP

        return MLP(layers, place.width, self)
