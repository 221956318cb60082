"""What both engines' canonical state rests on: flat ranges of stored parameters, fragments, slots, initial values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, weight_slot
from pretrain.optim.muon import MuonAdamW
from pretrain.parallel.canonical import CanonicalParameter, Part, canonical_parameters

STEP = "step"
"""Every state's count of steps; the others are flat."""
GRADIENT = "gradient"
"""Slot of fragments that hold a step's gradient; never part of a checkpoint."""


def full_precision_values(model: nn.Module) -> dict[str, Tensor]:
    """Initial FP32 values by module name. Engines round to bf16 into new memory, so this keeps the old one alive."""
    return {p.module_name: p.tensor.detach() for p in canonical_parameters(model) if p.tensor.requires_grad}


def step_count(states: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The optimizer's step count from its states by tensor, 0 before the first step."""
    return {STEP: next((float(state[STEP]) for state in states if STEP in state), 0.0)}


def start_state(optimizer: torch.optim.Optimizer, key: Tensor, step: float) -> tuple[str, ...]:
    """Give the tensor ``key`` the state that it has after ``step`` steps, with zero moments; returns their names."""
    slots = optimizer.slots(key) if isinstance(optimizer, MuonAdamW) else ("exp_avg", "exp_avg_sq")
    state = optimizer.state[key]
    state[STEP] = torch.tensor(step, dtype=torch.float32)
    for slot in slots:
        state[slot] = torch.zeros_like(key, memory_format=torch.preserve_format)
    return slots


def forget_state(optimizer: torch.optim.Optimizer) -> None:
    """Back to the state before the first step, of an optimizer that may have made some."""
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                value.zero_()


def flat_slots(optimizer: torch.optim.Optimizer, key: Tensor) -> Iterator[tuple[str, Tensor]]:
    """State of the tensor ``key`` that has a number for each of its elements: names and flat values."""
    for slot, value in optimizer.state.get(key, {}).items():
        if torch.is_tensor(value) and value.shape == key.shape and slot != STEP:
            yield slot, value.view(-1)


def cut(parameter: CanonicalParameter, slot: str, start: int, values: Tensor) -> Iterator[Fragment]:
    """Split ``values``, flat elements of the stored parameter from ``start`` on, at the borders of logical tensors."""
    for part, low, high in overlaps(parameter, start, values.numel()):
        piece = values[low - start : high - start]
        yield Fragment(part.name, slot, part.shape, low - part.start, piece, part.shard)


def paste(
    parameter: CanonicalParameter, start: int, target: Tensor, reader: CheckpointReader, slot: str | None
) -> None:
    """Fill ``target``, flat elements of the stored parameter from ``start`` on (slot None: the weight)."""
    for part, low, high in overlaps(parameter, start, target.numel()):
        source = slot or weight_slot(reader, part.name)
        values = reader.read_shard(part.name, source, part.shard, low - part.start, high - part.start)
        target[low - start : high - start].copy_(values)


def overlaps(parameter: CanonicalParameter, start: int, numel: int) -> Iterator[tuple[Part, int, int]]:
    """Logical tensors that have some of ``numel`` flat elements of the stored parameter from ``start`` on, and the
    first and last (exclusive) of these that each has, counted in the parameter."""
    for part in parameter.parts:
        low, high = max(start, part.start), min(start + numel, part.stop)
        if low < high:
            yield part, low, high
