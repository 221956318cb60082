"""Which parameters are matrices to Muon, and where the logical matrices lie in stored parameters.

A packed projection (q, k, v; z, x, B, C, dt; gate, up) is one matrix for each of its components, a stack of experts
[E, rows, columns] one for each expert. A tensor-parallel rank stores a :class:`Shard` of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from pretrain.parallel.canonical import CanonicalParameter, Part
from pretrain.parallel.layers import exempt_from_muon
from pretrain.parallel.shard import Shard


@dataclass(frozen=True)
class Matrix:
    """A logical matrix of ``shape`` (rows, columns), of which ``shard`` is stored from flat element ``start`` of the
    parameter on."""

    name: str
    shape: tuple[int, int]
    shard: Shard
    start: int


def is_exempt(parameter: Tensor) -> bool:
    """Whether weight decay leaves the parameter alone: marked so, or fewer than two dimensions."""
    return getattr(parameter, "no_weight_decay", False) or len(_shape(parameter)) < 2


def takes_muon(parameter: Tensor) -> bool:
    """Whether Muon orthogonalises the parameter's updates: a matrix, or a marked stack of matrices, that neither weight
    decay nor the mark of :func:`pretrain.parallel.layers.exempt_from_muon` spares."""
    if is_exempt(parameter) or getattr(parameter, "no_muon", False):
        return False
    num_dimensions = len(_shape(parameter))
    return num_dimensions == 2 or (num_dimensions == 3 and getattr(parameter, "matrix_stack", False))


def mark_embeddings(model: nn.Module) -> None:
    """Leave lookup tables to AdamW, also in models that are not built from parallel layers."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            exempt_from_muon(module.weight)


def matrices(parameter: CanonicalParameter) -> Iterator[Matrix]:
    """The logical matrices of a parameter that :func:`takes_muon`."""
    for part in parameter.parts:
        if len(part.shape) == 2:
            yield Matrix(part.name, (part.shape[0], part.shape[1]), part.shard, part.start)
        else:
            yield from _stacked(part)


def _stacked(part: Part) -> Iterator[Matrix]:
    """One matrix for each expert that is stored here, whole or in part."""
    num_experts, *sizes = part.shape
    shape, shard = (sizes[0], sizes[1]), part.shard
    size = prod(shape)
    if shard.num_rows == 1:  # whole experts, all of them or a share
        assert shard.start % size == 0
        assert shard.stop % size == 0
        for number, expert in enumerate(range(shard.start // size, shard.stop // size)):
            yield Matrix(f"{part.name}[{expert}]", shape, Shard.whole(shape), part.start + number * size)
        return
    rows = shard.num_rows // num_experts
    each = Shard(rows, shard.row_length, shard.start, shard.stop)
    for expert in range(num_experts):
        yield Matrix(f"{part.name}[{expert}]", shape, each, part.start + expert * each.numel)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    # DeepSpeed's stage 3 leaves an empty tensor in place of a parameter and keeps its shape aside.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
