"""Losses that a layer adds of its own, and what it reports, whatever the objective, the engine and the layout.

A layer in the middle of a model (a router that balances its experts) cannot hand a loss to the objective: a pipeline
stage sees no objective, and activation checkpointing runs the layer twice. So the layer ties its loss to hidden states
that it passes on (:meth:`AuxiliaryLoss.attach`), and the backward pass starts the loss's gradient when it comes by, as
Megatron-Core does. The engine sets once a step by which factor a sum over tokens is to be multiplied, the same as for
the objective's loss sum, so that both are divided by the same global number of targets; until an engine does,
nothing is added. Numbers to report are counted in the backward pass too: once, however often the layer ran forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Describe = Callable[[list[list[float]]], dict[str, float]]
"""Metrics of a model from the summed numbers of each of its layers, first layer first; picklable."""


class AuxiliaryLoss:
    """One layer's channel to the engine.

    Args:
        size: numbers that the layer reports.
        describe: makes metrics of them.
        counts: whether this rank's numbers count (False where another rank reports the same ones).
    """

    def __init__(self, size: int, describe: Describe, counts: bool = True) -> None:
        self.size = size
        self.describe = describe
        self.scale: float | None = None
        self._counts = counts
        self._sums: Tensor | None = None

    def attach(self, x: Tensor, loss: Tensor, numbers: Tensor) -> Tensor:
        """``x`` itself, through which the backward pass reaches ``loss`` and counts ``numbers``.

        Args:
            x: what the layer passes on; any shape, with gradient.
            loss: scalar sum over tokens on this rank (weights included).
            numbers: [size], detached.
        """
        return _Attach.apply(x, loss, numbers, self)

    def add(self, numbers: Tensor) -> None:
        """Count the numbers of one micro-batch."""
        if self._counts:
            self._sums = numbers.double() if self._sums is None else self._sums + numbers

    def take(self) -> list[float]:
        """Sums since the last call on this rank, which are then forgotten."""
        sums, self._sums = self._sums, None
        return [0.0] * self.size if sums is None else sums.tolist()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, numbers: Tensor, channel: AuxiliaryLoss) -> Tensor:
        ctx.channel, ctx.numbers, ctx.scale = channel, numbers, channel.scale
        ctx.loss = loss.new_empty(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        ctx.channel.add(ctx.numbers)
        dloss = None if ctx.scale is None else torch.full_like(ctx.loss, ctx.scale)
        return dx, dloss, None, None


@dataclass(frozen=True)
class LayerReport:
    """What the layers of one rank report of a step, to be summed over all ranks.

    Attributes:
        values: this rank's numbers; equally many on every rank.
        layout: for each kind of report, the layers' number of numbers and the function that describes them.
    """

    values: list[float]
    layout: dict[Describe, list[int]]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics of the whole model from the sums over all ranks."""
        metrics: dict[str, float] = {}
        start = 0
        for describe, sizes in self.layout.items():
            rows = []
            for size in sizes:
                rows.append(list(sums[start : start + size]))
                start += size
            metrics |= describe(rows)
        return metrics


class AuxiliaryLosses:
    """The channels of a model's layers, for an engine.

    Args:
        modules: those of this rank (pipeline chunks), layers named as in the whole model.
        gather: every rank's value on every rank, in rank order; called once.
    """

    def __init__(self, modules: Sequence[nn.Module], gather: Callable[[Any], list[Any]]) -> None:
        self._channels = {
            name: channel
            for module in modules
            for name, layer in module.named_modules()
            if isinstance(channel := getattr(layer, "auxiliary", None), AuxiliaryLoss)
        }
        own = {name: (channel.describe, channel.size) for name, channel in self._channels.items()}
        layers: dict[str, tuple[Describe, int]] = {}
        for held in gather(own):
            layers |= held
        order = sorted(layers, key=_natural)
        self._names: list[str] = []
        self._layout: dict[Describe, list[int]] = {}
        for kind in dict.fromkeys(layers[name][0] for name in order):
            names = [name for name in order if layers[name][0] is kind]
            self._names += names
            self._layout[kind] = [layers[name][1] for name in names]
        self._sizes = {name: layers[name][1] for name in self._names}

    def set_scale(self, scale: float) -> None:
        """Factor of the layers' loss sums in the gradients from the next forward pass on."""
        for channel in self._channels.values():
            channel.scale = scale

    def report(self) -> LayerReport | None:
        """What was counted since the last call; None for a model whose layers report nothing."""
        if not self._names:
            return None
        values: list[float] = []
        for name in self._names:
            channel = self._channels.get(name)
            values += [0.0] * self._sizes[name] if channel is None else channel.take()
        return LayerReport(values, self._layout)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``layers.10`` behind ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
