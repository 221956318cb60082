"""Between flat ranges of stored parameters and fragments of logical tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, weight_slot
from pretrain.parallel.canonical import CanonicalParameter, Part


def cut(parameter: CanonicalParameter, slot: str, start: int, values: Tensor) -> Iterator[Fragment]:
    """Split ``values``, flat elements of the stored parameter from ``start`` on, at the borders of logical tensors."""
    for part, low, high in _overlaps(parameter, start, values.numel()):
        piece = values[low - start : high - start]
        yield Fragment(part.name, slot, part.shape, low - part.start, piece, part.shard)


def paste(
    parameter: CanonicalParameter, start: int, target: Tensor, reader: CheckpointReader, slot: str | None
) -> None:
    """Fill ``target``, flat elements of the stored parameter from ``start`` on (slot None: the weight)."""
    for part, low, high in _overlaps(parameter, start, target.numel()):
        source = slot or weight_slot(reader, part.name)
        values = reader.read_shard(part.name, source, part.shard, low - part.start, high - part.start)
        target[low - start : high - start].copy_(values)


def _overlaps(parameter: CanonicalParameter, start: int, numel: int) -> Iterator[tuple[Part, int, int]]:
    for part in parameter.parts:
        low, high = max(start, part.start), min(start + numel, part.stop)
        if low < high:
            yield part, low, high
