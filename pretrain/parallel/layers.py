"""Linear and embedding builders: the one place where a layer says how it is split over devices.

A mixer asks its ``ParallelLayers`` for a column-parallel projection (output features split), a row-parallel
one (input features split, outputs summed) or a fused column-parallel one (several logical projections stored
in one matrix). :class:`TorchLayers` answers with plain ``torch.nn`` modules, that is, one device or data
parallelism only.

A packed parameter declares its components, see :mod:`pretrain.parallel.canonical`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import nn


class ParallelLayers(Protocol):
    """Builder of the layers that a parallel layout may split. Sizes count features of the whole model."""

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., d_in] -> [..., d_out], output features split."""
        ...

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., d_in] -> [..., d_out], input features split."""
        ...

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> nn.Module:
        """Several column-parallel linears in one matrix; the outputs are concatenated in the order given."""
        ...

    def embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        """Lookup table: int [...] -> [..., width]."""
        ...


class FusedLinear(nn.Linear):
    """Linear layer whose output rows are named components: [..., d_in] -> [..., sum of components]."""

    def __init__(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> None:
        super().__init__(d_in, sum(components.values()), bias=bias)
        names = ["weight", "bias"] if bias else ["weight"]
        self.canonical_components = {name: dict(components) for name in names}


class TorchLayers:
    """Unsplit layers: plain ``torch.nn`` modules."""

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> FusedLinear:
        layer = FusedLinear(d_in, components, bias=bias)
        _exempt_bias(layer)
        return layer

    def embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        return nn.Embedding(vocab_size, width)


def exempt_from_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter so that optimizers do not decay it; returns the parameter."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _exempt_bias(layer: nn.Linear) -> nn.Linear:
    if layer.bias is not None:
        exempt_from_weight_decay(layer.bias)
    return layer
