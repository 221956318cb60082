"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34); feature i turns with feature i + R/2.

Shapes: L = sequence length, B = batch, H = heads, P = head dim, R = features that are turned, the first of P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.nn.attention_config import RopeScaling
from pretrain.ops.blocks import arithmetic_dtype


def rotary_tables(
    position_ids_LB: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles ``position * frequency_i``, ``frequency_i = theta^(-2i/R)``, i < R/2,
    changed by ``scaling``.

    Returns:
        Two fp32 tensors [L, B, 1, R/2] (B may be 1), ready to broadcast over heads.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids_LB.device) / rotary_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, scaling)
    angles = position_ids_LB.float().unsqueeze(-1) * frequencies
    angles = angles.unsqueeze(2)
    return angles.cos(), angles.sin()


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies for texts longer than those of the first training.

    ``linear`` divides all by ``factor`` (Chen et al., arXiv 2306.15595). ``llama3`` (Llama 3.1) leaves those alone that
    turn at least ``high_freq_factor`` times within ``original_max_position_embeddings``, divides those that turn at
    most ``low_freq_factor`` times, and goes over linearly (in turns) between them.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def apply_rotary(x_LBHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + R/2) of the last dimension and pass on features from R on; computed in fp32, returned
    in the dtype of ``x_LBHP``.
    """
    rotary_dim = 2 * cos.shape[-1]
    turned_LBHR, rest = x_LBHP[..., :rotary_dim], x_LBHP[..., rotary_dim:]
    first, second = turned_LBHR.to(arithmetic_dtype(x_LBHP.dtype)).chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    if not rest.shape[-1]:
        return torch.cat(parts, dim=-1).to(x_LBHP.dtype)
    return torch.cat((*(part.to(x_LBHP.dtype) for part in parts), rest), dim=-1)
