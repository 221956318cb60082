"""Soft cap of logits (Gemma 2, arXiv 2408.00118, section 2): cap * tanh(x / cap)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, bent so that it stays within (-cap, cap), in its dtype. Keeps nothing but its result for the backward pass."""
    return _SoftCap.apply(x, cap)


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        y = (x / cap).tanh_().mul_(cap)
        ctx.save_for_backward(y)
        ctx.cap = cap
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        # dy (1 - tanh^2)
        return (y / ctx.cap).square_().neg_().add_(1.0).mul_(dy), None
