"""Adversarial inputs of the offloaded update, and an implementation of it apart from torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars, split_master

HYPER: dict[str, Any] = {"learning_rate": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

_BF16_TIES = [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x7F7F8000, 0x7F7EFFFF]
_EDGES = [
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000),  # zeros, subnormal, smallest normal
    *(0x3F800000, 0xBF800000, 0x33D6BF95, 0x0DA24260, 0x5F000000),  # 1, -1, 1e-7, 1e-30, 2^63
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000),  # the largest
]
_NOT_FINITE = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]


@dataclass
class State:
    """Flat tensors of one size."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor

    def arrays(self, weight: torch.dtype | None) -> list[Tensor | None]:
        """Copies, as the update takes them: with a weight of this type, none, or (int16) a master of low bits."""
        master, square, output = self.master.clone(), self.exp_avg_sq.clone(), None
        if weight == torch.int16:
            master, output, square = split_master(master, square)
        elif weight is not None:
            output = torch.zeros(master.numel(), dtype=weight)
        return [master, self.exp_avg.clone(), square, self.gradient.clone(), output]


def floats(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


def random_bits(n: int, seed: int) -> Tensor:
    """FP32 of uniformly random bits: every exponent, and some infinities and NaN."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32))


def adversarial_state(gradient_dtype: torch.dtype, *, finite: bool = False, n: int = 40_000) -> State:
    """Random bits, a third of each array edge cases in random combination; moderate values in another third."""
    generator = np.random.default_rng(11)

    def mixed(seed: int, edges: list[int], scale: float) -> Tensor:
        values = random_bits(n, seed).nan_to_num(1.0)
        values[: n // 3] = floats(edges)[torch.from_numpy(generator.integers(0, len(edges), n // 3))]
        values[-(n // 3) :] = torch.from_numpy(generator.normal(0, scale, n // 3).astype(np.float32))
        return values

    gradient_edges = _EDGES if finite else [*_EDGES, *_NOT_FINITE]
    return State(
        mixed(1, [*_EDGES, *_BF16_TIES], 1.0),
        mixed(2, _EDGES, 0.01),
        mixed(3, _EDGES, 0.001).abs(),
        mixed(4, gradient_edges, 0.1).to(gradient_dtype),
    )


def numpy_adamw(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, s: StepScalars
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Master, moments and BF16 weight after one step: every operation on ``np.float32``, one at a time."""
    f = np.float32
    p, m, v = (tensor.numpy().copy() for tensor in (master, exp_avg, exp_avg_sq))
    with np.errstate(all="ignore"):
        g = gradient.float().numpy() * f(s.grad_scale)
        difference = g - m
        share = f(s.w1) * difference
        m = m + share
        kept = f(s.beta2) * v
        square = g * g
        added = f(s.w2) * square
        v = kept + added
        p = p * f(s.decay)
        root = np.sqrt(v)
        root = root * f(s.inv_root)
        root = root + f(s.eps)
        quotient = m / root
        update = f(s.step_size) * quotient
        p = p - update
    assert p.dtype == m.dtype == v.dtype == np.float32
    return torch.from_numpy(p), torch.from_numpy(m), torch.from_numpy(v), _nearest_bf16(p)


def _nearest_bf16(values: np.ndarray) -> Tensor:
    """By distance to both neighbours, in float64: the nearer, or of two equally near the one with an even last bit."""
    below = (values.view(np.uint32) >> 16).astype(np.uint32)  # towards zero
    above = below + 1

    def number(bits: np.ndarray) -> np.ndarray:
        plain = (bits << 16).astype(np.uint32).view(np.float32).astype(np.float64)
        return np.where((bits & 0x7FFF) == 0x7F80, np.copysign(2.0**128, plain), plain)

    exact = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        to_below, to_above = np.abs(exact - number(below)), np.abs(number(above) - exact)
        up = (to_above < to_below) | ((to_above == to_below) & (below & 1 == 1))
    bits = np.where(np.isinf(values), below, np.where(up, above, below))
    bits = np.where(np.isnan(values), 0x7FC0, bits)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal bits, zeros with their sign included; of NaN only that both are."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    integer = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    same = ours.view(integer) == theirs.view(integer)
    if ours.dtype.is_floating_point:
        same |= ours.isnan() & theirs.isnan()
    if not same.all():
        index = int((~same).nonzero()[0])
        raise AssertionError(
            f"{int((~same).sum())} of {same.numel()} differ, first at {index}: {ours[index].item()!r} and "
            f"{theirs[index].item()!r}"
        )
