"""Parameters and forward FLOPs of each layer kind. Torch-free: planning reads this without loading torch.

FLOPs count matrix products only (two for each multiply-add), as executed: causal attention and the
intra-chunk part of SSD compute full square matrices, and no half is deducted. Norms, activations and the
depthwise convolution are left out; the backward pass costs twice the forward.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Cost of one layer.

    Attributes:
        parameters: number of trained values.
        flops_per_token: forward FLOPs, averaged over the tokens of a sequence.
    """

    parameters: int
    flops_per_token: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops_per_token + other.flops_per_token)


def linear_cost(d_in: int, d_out: int, bias: bool = False) -> Cost:
    """Linear layer."""
    return Cost(d_in * d_out + bias * d_out, 2 * d_in * d_out)


def norm_cost(width: int) -> Cost:
    """RMSNorm."""
    return Cost(width, 0)


def attention_cost(width: int, num_heads: int, num_kv_heads: int, head_dim: int, sequence_length: int) -> Cost:
    """Grouped-query attention: projections, scores and weighted values, every query against every key."""
    projections = linear_cost(width, (num_heads + 2 * num_kv_heads) * head_dim) + linear_cost(
        num_heads * head_dim, width
    )
    return projections + Cost(0, 4 * sequence_length * num_heads * head_dim)


def mlp_cost(width: int, hidden_size: int, gated: bool) -> Cost:
    """Two linear layers, three when gated."""
    return linear_cost(width, (2 if gated else 1) * hidden_size) + linear_cost(hidden_size, width)


def mamba2_cost(
    width: int, inner: int, head_dim: int, state_dim: int, num_groups: int, conv_kernel: int, chunk_size: int
) -> Cost:
    """Mamba-2 mixer: projections and the four products of chunked SSD (arXiv 2405.21060, section 6).

    Per token and chunk of Q: C B^T (2 Q N G), its product with the inputs (2 Q inner), the chunk's state (2 N
        inner) and
    the state's output (2 N inner). Carrying states between chunks is left out (a factor Q smaller).
    """
    heads = inner // head_dim
    packed = inner + 2 * num_groups * state_dim
    projections = linear_cost(width, inner + packed + heads) + linear_cost(inner, width)
    own_parameters = packed * (conv_kernel + 1) + 3 * heads + inner
    ssd = 2 * chunk_size * (state_dim * num_groups + inner) + 4 * state_dim * inner
    return projections + Cost(own_parameters, ssd)
