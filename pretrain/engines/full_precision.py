"""FP32 values of marked parameters for the forward pass of a bf16 module.

DeepSpeed casts every parameter to bf16 and keeps FP32 masters in pieces. For parameters marked by
:func:`pretrain.parallel.layers.keep_fp32` (a few small tensors: Mamba's A_log, D and dt_bias, a router) whole FP32
copies of the masters are held beside the weights, and whoever reads the attribute of the module gets the copy. The
gradient goes to the bf16 parameter, in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.parallel.canonical import canonical_parameters

Fetch = Callable[[str], tuple[int, Tensor] | None]
"""Module name of a parameter to first flat element and FP32 values that this rank holds of it, None for nothing."""


class FullPrecision:
    """Makes the marked, trained parameters of ``module`` readable in FP32.

    Construct it before the parameters are cast or cut; then :meth:`refresh` whenever masters have changed. Collective
    over the default group.

    Args:
        module: still in FP32.
        device: of the forward pass.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        marked = [
            p for p in canonical_parameters(module) if p.tensor.requires_grad and getattr(p.tensor, "keep_fp32", False)
        ]
        self._flat = torch.zeros(sum(p.tensor.numel() for p in marked), dtype=torch.float32, device=device)
        self._places: dict[str, Tensor] = {}
        values: dict[int, Tensor] = {}
        offset = 0
        for parameter in marked:
            stop = offset + parameter.tensor.numel()
            self._places[parameter.module_name] = self._flat[offset:stop]
            values[id(parameter.tensor)] = self._flat[offset:stop].view(parameter.tensor.shape)
            offset = stop
        for owner in module.modules():
            kept = {name: values[id(p)] for name, p in owner._parameters.items() if id(p) in values}
            if kept:
                owner.__dict__["_full_precision"] = kept
                owner.__class__ = _reader(type(owner), tuple(kept))

    @torch.no_grad()
    def refresh(self, fetch: Fetch) -> None:
        """Take over the masters, of which each rank has a part."""
        if not self._places:
            return
        self._flat.zero_()
        for name, place in self._places.items():
            if (held := fetch(name)) is not None:
                start, values = held
                place[start : start + values.numel()].copy_(values)
        torch.distributed.all_reduce(self._flat)


class _StraightThrough(torch.autograd.Function):
    """The FP32 value, with the gradient of the rounded weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


_readers: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reader(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """``cls`` with the attributes ``names`` read in FP32."""

    if (known := _readers.get((cls, names))) is not None:
        return known

    def reading(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            value: Tensor = _StraightThrough.apply(module._parameters[name], module.__dict__["_full_precision"][name])
            return value

        return property(read)

    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = type(cls.__name__, (cls,), body | {name: reading(name) for name in names})
    return _readers.setdefault((cls, names), made)
