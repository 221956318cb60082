"""Linear and embedding builders: the one place where a layer says how it is split over devices.

A mixer asks its ``ParallelLayers`` for a column-parallel projection (output features split), a row-parallel
one (input features split, outputs summed) or a fused column-parallel one (several logical projections stored
in one matrix), and for its local share of a count of heads or groups. :class:`TorchLayers` answers with plain
``torch.nn`` modules and no split; :class:`pretrain.parallel.megatron_layers.MegatronLayers` with Megatron-Core's
layers, split over tensor-parallel ranks.

With sequence parallelism the residual stream and the norms hold an equal share of the sequence (dim 0) on each
tensor-parallel rank: embeddings and row layers scatter the sequence, column layers and heads gather it. What lies
between a column and a row layer sees whole sequences and a share of the features.

A packed parameter declares its components, see :mod:`pretrain.parallel.canonical`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.parallel.vocabulary import VocabularyShard

TensorT = TypeVar("TensorT", bound=Tensor)


class ParallelLayers(Protocol):
    """Builder of the layers that a parallel layout may split. Sizes count features of the whole model.

    ``tensor_rank`` of ``tensor_size`` is this process's share of every split layer; ``sequence_parallel`` tells
    whether hidden states between layers hold a share of the sequence.
    """

    tensor_rank: int
    tensor_size: int
    sequence_parallel: bool

    def local(self, count: int) -> int:
        """This rank's share of ``count`` heads, groups or features; ``tensor_size`` divides ``count``."""
        ...

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., d_in] -> [..., local d_out], output features split."""
        ...

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        """Linear [..., local d_in] -> [..., d_out], input features split."""
        ...

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> nn.Module:
        """Several column-parallel linears in one matrix; the (local) outputs are concatenated in the order given."""
        ...

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        """Lookup table: int [L, B] -> [L, B, width]; rows split."""
        ...

    def head(self, width: int, vocab_size: int) -> nn.Module:
        """Untied output projection [L, B, width] -> [L, B, local vocab_size]."""
        ...

    def tied_logits(self, x_LBD: Tensor, embedding_weight: Tensor) -> Tensor:
        """Output projection with the (local) matrix of an :meth:`embedding`."""
        ...

    def own(self, parameter: nn.Parameter, dim: int = 0) -> nn.Parameter:
        """Mark a parameter made with local sizes as this rank's share along ``dim``; returns it."""
        ...

    def replicated(self, parameter: nn.Parameter) -> nn.Parameter:
        """Mark a whole parameter that works on hidden states between layers (a norm's weight); returns it."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Hidden states between layers -> whole sequences on every rank, as column layers take them: for computations
        of its own on a share of the features. Gradients are summed over the ranks.
        """
        ...

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums on every rank -> their sum as hidden states between layers, as row layers give them."""
        ...

    def sum_inside(self, x: Tensor) -> Tensor:
        """Partial sums on every rank -> their sum on every rank, for use by each on its share of the features (so
        gradients are summed too).
        """
        ...

    def whole_inside(self, parameter: nn.Parameter) -> Tensor:
        """A parameter that every rank holds whole, for use by each on its share of the features (a norm of heads); its
        gradient is summed over the ranks. Such a parameter is not marked as :meth:`replicated`.
        """
        ...

    def vocabulary(self, vocab_size: int) -> VocabularyShard | None:
        """The part of the vocabulary whose logits this rank computes; None: all of it."""
        ...


class FusedLinear(nn.Linear):
    """Linear layer whose output rows are named components: [..., d_in] -> [..., sum of components]."""

    def __init__(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> None:
        super().__init__(d_in, sum(components.values()), bias=bias)
        names = ["weight", "bias"] if bias else ["weight"]
        self.canonical_components = {name: dict(components) for name in names}


class TorchLayers:
    """Unsplit layers: plain ``torch.nn`` modules."""

    tensor_rank: int = 0
    tensor_size: int = 1
    sequence_parallel: bool = False

    def local(self, count: int) -> int:
        return count

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Linear:
        return _exempt_bias(nn.Linear(d_in, d_out, bias=bias))

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> FusedLinear:
        layer = FusedLinear(d_in, components, bias=bias)
        _exempt_bias(layer)
        return layer

    def embedding(self, vocab_size: int, width: int) -> nn.Embedding:
        layer = nn.Embedding(vocab_size, width)
        exempt_from_muon(layer.weight)
        return layer

    def head(self, width: int, vocab_size: int) -> nn.Linear:
        layer = nn.Linear(width, vocab_size, bias=False)
        exempt_from_muon(layer.weight)
        return layer

    def tied_logits(self, x_LBD: Tensor, embedding_weight: Tensor) -> Tensor:
        return F.linear(x_LBD, embedding_weight)

    def own(self, parameter: nn.Parameter, dim: int = 0) -> nn.Parameter:
        return parameter

    def replicated(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def sum_inside(self, x: Tensor) -> Tensor:
        return x

    def whole_inside(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def vocabulary(self, vocab_size: int) -> None:
        return None


def exempt_from_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter so that optimizers do not decay it; returns the parameter."""
    parameter.no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def exempt_from_muon(parameter: TensorT) -> TensorT:
    """Mark a parameter with two dimensions that is no matrix between hidden features (lookup tables, output heads,
    convolutions, routers), so that Muon leaves it to AdamW; returns the parameter.
    """
    parameter.no_muon = True  # type: ignore[attr-defined]
    return parameter


def stack_of_matrices(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter [E, rows, columns] of E matrices of their own (experts), so that Muon takes each of them;
    returns the parameter.
    """
    parameter.matrix_stack = True  # type: ignore[attr-defined]
    return parameter


def keep_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a small parameter whose full FP32 value the forward pass reads also when training in bf16; returns it."""
    parameter.keep_fp32 = True  # type: ignore[attr-defined]
    return parameter


def _exempt_bias(layer: nn.Linear) -> nn.Linear:
    if layer.bias is not None:
        exempt_from_weight_decay(layer.bias)
    return layer
