"""What both engines' canonical state rests on: flat ranges of stored parameters, fragments, slots, initial values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, weight_slot
from pretrain.parallel.canonical import CanonicalParameter, Part, canonical_parameters

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names for AdamW's state."""


def full_precision_values(model: nn.Module) -> dict[str, Tensor]:
    """Initial FP32 values by module name. Engines round to bf16 into new memory, so this keeps the old one alive."""
    return {p.module_name: p.tensor.detach() for p in canonical_parameters(model) if p.tensor.requires_grad}


def step_count(states: Iterable[dict[str, Any]]) -> dict[str, float]:
    """AdamW's step count from its states by tensor, 0 before the first step."""
    return {STEP: next((float(state[STEP]) for state in states if STEP in state), 0.0)}


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
