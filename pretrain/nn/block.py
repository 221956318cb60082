"""Pre-norm residual layer with a single sublayer: y = x + mixer(norm(x)).

Shapes: L = sequence length, B = batch, D = model width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.nn.initialisation import Initialiser, constant
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.norm import RMSNorm


class Mixer(Protocol):
    """What a sublayer offers besides being an ``nn.Module``."""

    def __call__(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """Mix; with a cache, continue from it and update it (a prompt into an empty cache, then single
        positions).
        """
        ...

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Empty generation cache, or None for a mixer without memory."""
        ...

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Initialiser of each of the mixer's parameters; ``out_std`` for the output projection."""
        ...


class Block(nn.Module):
    """Residual layer around a mixer (an ``nn.Module`` with the :class:`Mixer` methods): x_LBD -> y_LBD."""

    def __init__(self, norm: RMSNorm, mixer: Any) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Initialiser of each parameter, by its name in this layer."""
        mixer = {f"mixer.{name}": fill for name, fill in self.mixer.initialisers(std, out_std).items()}
        return {"norm.weight": constant(1.0), **mixer}

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """Residual stream in, residual stream out, in its dtype."""
        return x_LBD + self.mixer(self.norm(x_LBD), layout, cache)
