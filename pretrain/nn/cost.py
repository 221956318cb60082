"""What a layer costs: parameters, FLOPs, activation bytes, generation state. Torch-free, for planning.

FLOPs count matrix products only (two for each multiply-add), as executed: causal attention and the
intra-chunk part of SSD compute full square matrices, and no half is deducted. Norms, activations and the
depthwise convolution are left out; the backward pass costs twice the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
"""Bytes of a number that is kept in fp32 whatever the parameters' precision."""


@dataclass(frozen=True)
class Cost:
    """Cost of one layer, or of several added up.

    Attributes:
        parameters: number of trained values.
        flops_per_token: forward FLOPs, averaged over the tokens of a sequence.
        idle_parameters: those of ``parameters`` that one token does not pass through (experts it is not routed to).
        activation_bytes_per_token: what one token's forward pass keeps for the backward pass (without activation
            checkpointing), averaged over the tokens of a sequence.
        state_bytes: what generation keeps for one sequence after ``sequence_length`` tokens: recurrent states, and
            keys and values.
    """

    parameters: int = 0
    flops_per_token: float = 0.0
    idle_parameters: int = 0
    activation_bytes_per_token: float = 0.0
    state_bytes: float = 0.0

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return self.parameters - self.idle_parameters

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.flops_per_token + other.flops_per_token,
            self.idle_parameters + other.idle_parameters,
            self.activation_bytes_per_token + other.activation_bytes_per_token,
            self.state_bytes + other.state_bytes,
        )


def linear_cost(d_in: int, d_out: int, bias: bool = False) -> Cost:
    """Linear layer. What it keeps, its input, is counted where the input is made."""
    return Cost(d_in * d_out + bias * d_out, 2 * d_in * d_out)
