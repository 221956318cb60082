"""Looking into one step: gradients by parameter, tensors that are not finite, losses by sample. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.engines.base import Batch, Engine
from pretrain.parallel.process import gather_objects

Sums = dict[str, list[float]]
"""By name: sum of squares of the finite elements, elements that are not finite, elements."""


def sums_by_name(fragments: Iterable[Fragment], *, with_slot: bool) -> Sums:
    """Over all ranks, of each logical tensor. Collective."""
    own: Sums = {}
    for fragment in fragments:
        values = fragment.values.detach()
        if not values.is_floating_point():
            continue
        finite = torch.isfinite(values)
        squares = float(torch.where(finite, values, torch.zeros_like(values)).double().square().sum())
        key = f"{fragment.slot} of {fragment.name}" if with_slot else fragment.name
        entry = own.setdefault(key, [0.0, 0.0, 0.0])
        for index, value in enumerate((squares, float(values.numel() - int(finite.sum())), float(values.numel()))):
            entry[index] += value
    total: Sums = {}
    for part in gather_objects(own):
        for name, entry in part.items():
            into = total.setdefault(name, [0.0, 0.0, 0.0])
            for index, value in enumerate(entry):
                into[index] += value
    return total


def gradient_norms(sums: Sums) -> list[dict[str, Any]]:
    """Largest norm first, parameters with elements that are not finite before all others."""
    rows = [
        {
            "name": name,
            "norm": math.sqrt(squares) if not bad else math.nan,
            "not_finite": round(bad),
            "elements": round(count),
        }
        for name, (squares, bad, count) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row["not_finite"], -row["norm"] if not row["not_finite"] else 0.0))


def not_finite(sums: Sums) -> list[dict[str, Any]]:
    """Tensors with elements that are not finite."""
    return [
        {"name": name, "not_finite": round(bad), "elements": round(count)}
        for name, (_, bad, count) in sums.items()
        if bad
    ]


@contextmanager
def watched_outputs(parts: Iterable[nn.Module], found: list[str]) -> Iterator[None]:
    """Appends to ``found`` the names of modules whose output is not finite, in the order of their computation."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if name not in found and any(
                isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors
            ):
                found.append(name)

        handles.append(module.register_forward_hook(look))

    for part in parts:
        for name, module in part.named_modules():
            watch(name or type(module).__name__, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_of_sample(engine: Engine, objective: Any, row: Batch) -> tuple[float, float]:
    """Loss sum (nats) and number of targets of one row, without dropout. Collective; 0 where the rank is no leader."""
    result = engine.eval_step(row, objective)
    targets = float(objective.denominator(row)) if engine.is_data_leader else 0.0
    return result.loss_sum, targets
