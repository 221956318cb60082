"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34); feature i turns with feature i + P/2.

Shapes: L = sequence length, B = batch, H = heads, P = head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.blocks import arithmetic_dtype


def rotary_tables(position_ids_LB: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles ``position * theta^(-2i/P)``, i < P/2.

    Returns:
        Two fp32 tensors [L, B, 1, P/2] (B may be 1), ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_LB.device) / head_dim
    angles = position_ids_LB.float().unsqueeze(-1) * theta**-exponents
    angles = angles.unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rotary(x_LBHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + P/2) of the last dimension; computed in fp32, returned in the dtype of
    ``x_LBHP``.
    """
    first, second = x_LBHP.to(arithmetic_dtype(x_LBHP.dtype)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_LBHP.dtype)
