"""RMSNorm layers, plain and gated, with fp32 statistics (see :mod:`pretrain.ops.norm`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.ops.norm import gated_rms_norm, rms_norm
from pretrain.parallel.layers import ParallelLayers, exempt_from_weight_decay


class RMSNorm(nn.Module):
    """Divide by the root mean square over the features, then scale: [..., D] -> [..., D] in the input's
    dtype.

    For hidden states between layers: all features on every rank, possibly a share of the sequence.
    """

    def __init__(self, layers: ParallelLayers, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = layers.replicated(exempt_from_weight_decay(nn.Parameter(torch.ones(width))))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every position by itself."""
        return rms_norm(x, self.weight, self.eps)


class RMSNormGated(nn.Module):
    """Mamba-2's output norm: RMSNorm of ``y * silu(z)`` over each of ``num_groups`` equal parts of the
    features. Groups are split over tensor-parallel ranks; both counts are those of the whole model.
    """

    def __init__(self, layers: ParallelLayers, width: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_groups = layers.local(num_groups)
        self.eps = eps
        self.weight = layers.own(exempt_from_weight_decay(nn.Parameter(torch.ones(layers.local(width)))))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate first, norm second: y and z, both [..., D] -> [..., D]."""
        return gated_rms_norm(y, z, self.weight, self.num_groups, self.eps)
