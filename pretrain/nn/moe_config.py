"""Configuration, rules and cost of the mixture of experts. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pretrain.nn.cost import FP32, Cost
from pretrain.nn.mixer_config import Place, Violation, no_hidden_feature, not_positive, uneven_share
from pretrain.nn.mlp_config import Activation, MLPConfig

if TYPE_CHECKING:
    from pretrain.nn.moe import MoE
    from pretrain.parallel.layers import ParallelLayers

_INT64 = 8


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: every token goes through the ``top_k`` MLPs that its router scores highest.

    No expert has a capacity and no token is dropped.

    Attributes:
        num_experts: MLPs to choose from.
        top_k: MLPs of one token.
        ratio: hidden features of one expert as a multiple of the model's width, used when ``hidden_size`` is None.
        hidden_size: features between the linear layers of one expert.
        activation: of the experts, as in the MLP: ``swiglu``, ``gelu`` or ``relu2``.
        shared_hidden_size: hidden features of an MLP that every token goes through besides; 0 for none.
        router: scores from the logits: ``softmax`` over the experts (Mixtral) or ``sigmoid`` of each (DeepSeek-V3).
        normalise_top_k: the weights of a token's experts are divided by their sum.
        routed_scale: factor of the weights after that.
        balance_loss: weight of the load-balancing loss of each sequence (DeepSeek-V3, arXiv 2412.19437, eq. 17-20);
            0 for none.
        z_loss: weight of the squared log-normaliser of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5); 0 for
            none.
    """

    label: ClassVar[str] = "MoE"

    num_experts: int = 8
    top_k: int = 2
    ratio: float = 4.0
    hidden_size: int | None = None
    activation: Activation = "swiglu"
    shared_hidden_size: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise_top_k: bool = True
    routed_scale: float = 1.0
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def hidden(self, width: int) -> int:
        """Hidden features of one expert, default filled in."""
        return round(self.ratio * width) if self.hidden_size is None else self.hidden_size

    @property
    def shared(self) -> MLPConfig | None:
        """The expert of every token."""
        if not self.shared_hidden_size:
            return None
        return MLPConfig(hidden_size=self.shared_hidden_size, activation=self.activation)

    def violations(self, width: int, count: int) -> Iterator[Violation]:
        """See :class:`pretrain.nn.mixer_config.MixerConfig`."""
        positive = {"num_experts": 8, "top_k": 2, "routed_scale": 1.0}
        yield from not_positive(self, positive | ({"ratio": 4.0} if self.hidden_size is None else {"hidden_size": 512}))
        yield from no_hidden_feature(self, width)
        for name, example in (("shared_hidden_size", 512), ("balance_loss", 0.01), ("z_loss", 0.001)):
            if not 0 <= getattr(self, name) < math.inf:
                yield (
                    name,
                    getattr(self, name),
                    "must be a finite number and not negative",
                    f"set 0 (none) or for example {example}",
                )
        if self.top_k > self.num_experts > 0:
            rule = f"must not be more than the {self.num_experts} experts"
            yield "top_k", self.top_k, rule, f"set top_k to {self.num_experts} or less, or more num_experts"

    def parallel_violations(self, width: int, tensor_parallel: int) -> Iterator[Violation]:
        """The hidden features of every expert are split."""
        yield from uneven_share("hidden_size", self.hidden(width), tensor_parallel)
        yield from uneven_share("shared_hidden_size", self.shared_hidden_size, tensor_parallel)

    def cost(self, place: Place, sequence_length: int, bytes_per_value: int = 2) -> Cost:
        """Router, the experts of one token, and the shared one.

        Kept for the backward pass, for each token: the input; for each of its experts the inputs of the activation and
        its weighted result; of the routing, fp32 scores and int64 places.
        """
        width, hidden = place.width, self.hidden(place.width)
        matrices = 3 if self.activation == "swiglu" else 2
        expert = matrices * width * hidden
        experts = Cost(
            parameters=self.num_experts * (width + expert),
            flops_per_token=2 * (self.num_experts * width + self.top_k * expert),
            idle_parameters=(self.num_experts - self.top_k) * expert,
            activation_bytes_per_token=bytes_per_value * (width + self.top_k * matrices * hidden)
            + self._routing_bytes(sequence_length),
        )
        if self.shared is None:
            return experts
        shared = self.shared.cost(place, sequence_length, bytes_per_value)
        return experts + shared + Cost(activation_bytes_per_token=-bytes_per_value * width)  # the input is the same

    def build(self, layers: ParallelLayers, place: Place) -> MoE:
        """The module."""
        from pretrain.nn.moe import MoE

        return MoE(layers, place.width, self)

    def _routing_bytes(self, sequence_length: int) -> float:
        """What the routing of one token keeps: scores, logits and their normaliser for the z-loss, weights before and
        after normalisation with their sum, the loads of a sequence; four places of each of its experts.
        """
        balanced, stabilised = self.balance_loss > 0, self.z_loss > 0
        numbers = self.num_experts + self.top_k + self.normalise_top_k * (self.top_k + 1)
        numbers += stabilised * (self.num_experts + 1) + (balanced and self.router == "sigmoid")
        return FP32 * (numbers + balanced * self.num_experts / sequence_length) + 4 * _INT64 * self.top_k
