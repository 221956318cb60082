"""Norm layers with fp32 statistics (see :mod:`pretrain.ops.norm`): LayerNorm, and RMSNorm plain, gated and of heads."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.nn.initialisation import Initialiser, constant
from pretrain.nn.norm_config import NormConfig
from pretrain.ops.backends import gated_rms_norm
from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.norm import layer_norm, rms_norm
from pretrain.parallel.layers import ParallelLayers, exempt_from_weight_decay


class Norm(Protocol):
    """A norm of the residual stream, besides being an ``nn.Module``."""

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalise every position by itself: [..., D] -> [..., D] in ``dtype`` (None: that of x)."""
        ...

    def initialisers(self) -> dict[str, Initialiser]:
        """Initialiser of each parameter."""
        ...


def build_norm(layers: ParallelLayers, width: int, config: NormConfig) -> Any:
    """A :class:`Norm` of the configured kind for hidden states between layers: all features on every rank, possibly a
    share of the sequence.
    """
    if config.kind == "rms":
        return RMSNorm(layers, width, config.eps)
    return LayerNorm(layers, width, config.eps, shifted=config.kind == "layer1p")


class RMSNorm(nn.Module):
    """Divide by the root mean square over the features, then scale: [..., D] -> [..., D]."""

    def __init__(self, layers: ParallelLayers, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = layers.replicated(exempt_from_weight_decay(nn.Parameter(torch.ones(width))))

    def initialisers(self) -> dict[str, Initialiser]:
        """Ones."""
        return {"weight": constant(1.0)}

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See :class:`Norm`."""
        return rms_norm(x, self.weight, self.eps, dtype)


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation over the features, scale and shift (Ba et al., arXiv
    1607.06450): [..., D] -> [..., D].

    Args:
        shifted: the stored weight is the scale minus 1.
    """

    def __init__(self, layers: ParallelLayers, width: int, eps: float, shifted: bool) -> None:
        super().__init__()
        self.eps = eps
        self.shifted = shifted
        self.weight = layers.replicated(exempt_from_weight_decay(nn.Parameter(torch.ones(width))))
        self.bias = layers.replicated(exempt_from_weight_decay(nn.Parameter(torch.zeros(width))))

    def initialisers(self) -> dict[str, Initialiser]:
        """Scale one, shift zero."""
        return {"weight": constant(0.0 if self.shifted else 1.0), "bias": constant(0.0)}

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See :class:`Norm`."""
        scale = self.weight.to(arithmetic_dtype(x.dtype)) + 1 if self.shifted else self.weight
        return layer_norm(x, scale, self.bias, self.eps, dtype)


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head over its features: [..., H, P] -> [..., H, P]; all heads share one weight.

    Heads are split over tensor-parallel ranks while every rank holds the weight, so its gradient is summed over them.
    """

    def __init__(self, layers: ParallelLayers, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = exempt_from_weight_decay(nn.Parameter(torch.ones(head_dim)))
        self._parallel = layers

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every head by itself."""
        return rms_norm(x, self._parallel.whole_inside(self.weight), self.eps)


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
