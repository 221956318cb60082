"""Residual layers with a single sublayer, one class for each way to wire stream, norms and mixer.

A new way is a class here, registered in :data:`BLOCKS` under its name in ``NormConfig.placement`` (with what it costs).

Shapes: L = sequence length, B = batch, D = model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.nn.initialisation import Initialiser, constant, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.norm import build_norm
from pretrain.nn.norm_config import NormConfig
from pretrain.parallel.layers import ParallelLayers, exempt_from_weight_decay


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


class Block(nn.Module, ABC):
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

    @abstractmethod
    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """Residual stream in, residual stream out."""

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


class GRUGate(nn.Module):
    """What a GRU makes of its state x and an input y (Parisotto et al., arXiv 1910.06764, section 3.2):

    r = sigmoid(W_r y + U_r x),  z = sigmoid(W_z y + U_z x - b),  h = tanh(W_h y + U_h (r x)),  (1 - z) x + z h.
    """

    def __init__(self, layers: ParallelLayers, width: int) -> None:
        super().__init__()
        self.W, self.U = (layers.replicated(nn.Parameter(torch.empty(3 * width, width))) for _ in range(2))
        self.bias = layers.replicated(exempt_from_weight_decay(nn.Parameter(torch.empty(width))))
        self.canonical_components = {name: {"r": width, "z": width, "h": width} for name in ("W", "U")}

    def initialisers(self, std: float) -> dict[str, Initialiser]:
        """Normal matrices; b = 2, so that the layer begins near the identity."""
        return {"W": normal(std), "U": normal(std), "bias": constant(2.0)}

    def forward(self, x_LBD: Tensor, y_LBD: Tensor) -> Tensor:
        """The new stream, in the dtype of x; gates in that of the weights."""
        width, dtype = x_LBD.shape[-1], self.W.dtype
        r, z, h = F.linear(y_LBD.to(dtype), self.W).chunk(3, dim=-1)
        rz = F.linear(x_LBD.to(dtype), self.U[: 2 * width])
        r = torch.sigmoid(r + rz[..., :width])
        z = torch.sigmoid(z + rz[..., width:] - self.bias)
        h = torch.tanh(h + F.linear(r * x_LBD.to(dtype), self.U[2 * width :]))
        return torch.lerp(x_LBD, h.to(x_LBD.dtype), z.to(x_LBD.dtype))


class GRUGatedBlock(Block):
    """GRU(x, relu(f(N(x)))): the gated transformer layer of arXiv 1910.06764, for one sublayer."""

    def __init__(self, layers: ParallelLayers, width: int, norm: NormConfig, mixer: Any) -> None:
        super().__init__(layers, width, norm, mixer)
        self.gate = GRUGate(layers, width)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """See :class:`Block`."""
        gate = {f"gate.{name}": fill for name, fill in self.gate.initialisers(std).items()}
        return super().initialisers(std, out_std) | gate

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: Any = None) -> Tensor:
        """See :class:`Block`."""
        return self.gate(x_LBD, F.relu(self.mixer(self.norm(x_LBD, self.mixer_dtype), layout, cache)))


BLOCKS: dict[str, type[Block]] = {
    "pre": PreNormBlock,
    "post": PostNormBlock,
    "peri": PeriNormBlock,
    "gru": GRUGatedBlock,
}
"""The class of each ``NormConfig.placement``."""


def build_block(layers: ParallelLayers, width: int, norm: NormConfig, mixer: Any) -> Block:
    """The layer around ``mixer`` that ``norm`` asks for."""
    return BLOCKS[norm.placement](layers, width, norm, mixer)
