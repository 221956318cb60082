"""Parameters of the short causal convolution of Mamba mixers."""

from __future__ import annotations

import math

import torch
from torch import nn

from pretrain.nn.initialisation import Initialiser, uniform
from pretrain.parallel.layers import ParallelLayers, exempt_from_muon, exempt_from_weight_decay


class ShortConv(nn.Module):
    """Depthwise causal convolution over time, parameters only: weight [C, K] and bias [C] (None without), packed by
    component where there are several (``components`` counts the channels of the whole model).
    """

    def __init__(self, layers: ParallelLayers, components: dict[str, int], kernel: int, bias: bool = True) -> None:
        super().__init__()
        local = {name: layers.local(channels) for name, channels in components.items()}
        channels = sum(local.values())
        self.weight = layers.own(exempt_from_muon(nn.Parameter(torch.empty(channels, kernel))))
        self.bias = layers.own(exempt_from_weight_decay(nn.Parameter(torch.empty(channels)))) if bias else None
        names = ["weight", "bias"] if bias else ["weight"]
        self.canonical_components = {name: dict(local) for name in names} if len(local) > 1 else {}

    def initialisers(self) -> dict[str, Initialiser]:
        """As ``torch.nn.Conv1d``."""
        fill = uniform(1 / math.sqrt(self.weight.shape[1]))
        return {"weight": fill} if self.bias is None else {"weight": fill, "bias": fill}
