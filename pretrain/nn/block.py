"""Residual layers with a single sublayer, one class for each way to wire stream, norms and mixer.

A new way is a class here, registered in :data:`BLOCKS` under its name in ``NormConfig.placement`` (with what it costs).

Shapes: L = sequence length, B = batch, D = model width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.nn.initialisation import Initialiser
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.norm import build_norm
from pretrain.nn.norm_config import NormConfig
from pretrain.parallel.layers import ParallelLayers


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
    """Residual layer around a mixer (an ``nn.Module`` with the :class:`Mixer` methods): x_LBD -> y_LBD.

    The stream may be kept in a higher precision than the mixer's parameters; it leaves in the dtype in which it came.
    """

    def __init__(self, layers: ParallelLayers, width: int, norm: NormConfig, mixer: Any) -> None:
        super().__init__()
        self.norm = build_norm(layers, width, norm)
        self.mixer = mixer

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Initialiser of each parameter, by its name in this layer."""
        mixer = {f"mixer.{name}": fill for name, fill in self.mixer.initialisers(std, out_std).items()}
        return {f"norm.{name}": fill for name, fill in self.norm.initialisers().items()} | mixer

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """Residual stream in, residual stream out."""
        raise NotImplementedError

    @property
    def mixer_dtype(self) -> torch.dtype:
        """What the mixer takes: the precision of its parameters, but for single ones that are kept in a higher one."""
        dtypes = (parameter.dtype for parameter in self.mixer.parameters())
        return min(dtypes, key=lambda dtype: dtype.itemsize)


class PreNormBlock(Block):
    """x + f(N(x))."""

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """See :class:`Block`."""
        return x_LBD + self.mixer(self.norm(x_LBD, self.mixer_dtype), layout, cache)


class PostNormBlock(Block):
    """N(x + f(x))."""

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """See :class:`Block`."""
        return self.norm(x_LBD + self.mixer(x_LBD.to(self.mixer_dtype), layout, cache))


class PeriNormBlock(Block):
    """x + N_out(f(N_in(x))), N_in named ``norm`` and N_out ``out_norm``."""

    def __init__(self, layers: ParallelLayers, width: int, norm: NormConfig, mixer: Any) -> None:
        super().__init__(layers, width, norm, mixer)
        self.out_norm = build_norm(layers, width, norm)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """See :class:`Block`."""
        out_norm = {f"out_norm.{name}": fill for name, fill in self.out_norm.initialisers().items()}
        return super().initialisers(std, out_std) | out_norm

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """See :class:`Block`."""
        y_LBD = self.mixer(self.norm(x_LBD, self.mixer_dtype), layout, cache)
        return x_LBD + self.out_norm(y_LBD)


BLOCKS: dict[str, type[Block]] = {"pre": PreNormBlock, "post": PostNormBlock, "peri": PeriNormBlock}
"""The class of each ``NormConfig.placement``."""


def build_block(layers: ParallelLayers, width: int, norm: NormConfig, mixer: Any) -> Block:
    """The layer around ``mixer`` that ``norm`` asks for."""
    return BLOCKS[norm.placement](layers, width, norm, mixer)
