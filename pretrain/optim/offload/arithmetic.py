"""The update of AdamW, specified: one order of FP32 operations, each rounded by itself, the same bits everywhere.

Scalars are computed in float64 and rounded once (:class:`StepScalars`). For each element, with the gradient widened
exactly to FP32::

    g = g * grad_scale
    m = m + w1 * (g - m)
    v = beta2 * v + w2 * (g * g)
    p = p * decay
    p = p - step_size * (m / (sqrt(v) * inv_root + eps))

No multiplication is fused with an addition, square root and division are correctly rounded, subnormal numbers are kept.
:func:`adamw_` is this specification in plain torch operations; the kernels of ``cpu_adamw`` and ``gpu_adamw`` give the
same bits (of NaN only that it is one: its sign and payload are not specified, but a BF16 weight is then 0x7FC0).

The master is either an FP32 tensor (:attr:`Master.FULL`) or the low 16 bits of one (:attr:`Master.LOW_BITS`), with a
BF16 weight that holds the rest: see :func:`split_master`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements worked on at a time: bounds the temporaries of :func:`adamw_` to some tens of MiB."""

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_QUIET_NAN = 0x7FC00000
_SIGN = -(1 << 31)


class Master(StrEnum):
    """How the FP32 master of a weight is stored: whole, or only the low 16 bits beside a BF16 weight."""

    FULL = "full"
    LOW_BITS = "low_bits"


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step, each exactly representable in FP32."""

    grad_scale: float
    beta1: float
    w1: float
    beta2: float
    w2: float
    decay: float
    step_size: float
    inv_root: float
    eps: float

    @classmethod
    def of(
        cls,
        *,
        step: int,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: float = 1.0,
    ) -> StepScalars:
        """Scalars of step ``step`` (the first is 1); ``grad_scale`` is clip factor / loss scale.

        Raises ``ValueError`` for a step below 1 and for betas outside [0, 1).
        """
        beta1, beta2 = betas
        if step < 1:
            raise ValueError(f"step = {step}: steps of the optimizer count from 1")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas = {betas}: expected two numbers of at least 0 and below 1")
        return cls(
            grad_scale=_fp32(grad_scale),
            beta1=_fp32(beta1),
            w1=_fp32(1 - beta1),
            beta2=_fp32(beta2),
            w2=_fp32(1 - beta2),
            decay=_fp32(1 - learning_rate * weight_decay),
            step_size=_fp32(learning_rate / (1 - beta1**step)),
            inv_root=_fp32(1 / math.sqrt(1 - beta2**step)),
            eps=_fp32(eps),
        )


def _fp32(value: float) -> float:
    """``value`` rounded to FP32, as a Python float; beyond its range infinite."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    weight: Tensor | None,
    scalars: StepScalars,
) -> None:
    """One step in place, on any device, by separate torch operations.

    All tensors are flat, contiguous and of equal size on one device. ``exp_avg``, ``exp_avg_sq``: FP32. ``gradient``:
    FP32, BF16 or FP16, unchanged. ``master``: FP32, and then ``weight`` (BF16, FP16, FP32 or None) receives the new
    value; or int16, and then ``weight`` is BF16 and holds the high half (:func:`split_master`).

    Raises ``ValueError`` when a tensor does not fit.
    """
    check_tensors(master, exp_avg, exp_avg_sq, gradient, weight)
    for start in range(0, master.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        _adamw_chunk(
            master[part],
            exp_avg[part],
            exp_avg_sq[part],
            gradient[part],
            None if weight is None else weight[part],
            scalars,
        )


def _adamw_chunk(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, weight: Tensor | None, s: StepScalars
) -> None:
    low_bits = master.dtype == torch.int16
    if low_bits:
        assert weight is not None
        p, v = join_master(master, weight, exp_avg_sq)
    else:
        p, v = master, exp_avg_sq
    g = gradient.float() * s.grad_scale
    exp_avg.add_((g - exp_avg).mul_(s.w1))
    v.mul_(s.beta2).add_((g * g).mul_(s.w2))
    p.mul_(s.decay)
    # The root of an FP32 number, taken in float64 and rounded, is the correctly rounded FP32 root; libraries that torch
    # calls for FP32 roots need not promise that.
    root = v.double().sqrt_().float().mul_(s.inv_root).add_(s.eps)
    p.sub_(torch.div(exp_avg, root, out=root).mul_(s.step_size))
    if low_bits:
        assert weight is not None
        low, high, tagged = split_master(p, v)
        master.copy_(low)
        weight.copy_(high)
        exp_avg_sq.copy_(tagged)
    elif weight is not None:
        if weight.dtype == torch.bfloat16:
            weight.copy_(round_to_bf16(p))
        else:
            weight.copy_(p)


def round_to_bf16(values: Tensor) -> Tensor:
    """FP32 to BF16, to nearest even; every NaN becomes 0x7FC0."""
    return _rounded(_bits(values)).to(torch.int16).view(torch.bfloat16)


def split_master(master: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An FP32 master as its low 16 bits (int16) and its BF16 rounding; and ``exp_avg_sq`` with the bit of ties.

    The weight is the master rounded to nearest even, as without splitting. Its bits are the high half of the master,
    one more where the low half rounds up. That follows from the low half, except for a tie (low half 0x8000), where
    either parity of the high half gives the same weight: the sign bit of the second moment, which is otherwise never
    set, is set where a tie was rounded up. Exact for every master that is not NaN (those that round to infinity
    included); a NaN stays NaN. ``exp_avg_sq`` may come with or without the bit.
    """
    bits = _bits(master)
    low = bits & 0xFFFF
    tie_up = (low == 0x8000) & ((bits >> 16) & 1 == 1)
    square = exp_avg_sq.view(torch.int32) & ~_SIGN
    tagged = torch.where(tie_up, square | _SIGN, square).view(torch.float32)
    return low.to(torch.int16), _rounded(bits).to(torch.int16).view(torch.bfloat16), tagged


def join_master(low: Tensor, weight: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
    """The FP32 master of ``split_master``'s three results, and ``exp_avg_sq`` without the bit of ties: new tensors."""
    low_half = low.to(torch.int32) & 0xFFFF
    square = exp_avg_sq.view(torch.int32)
    rounded_up = (low_half + (square < 0)) > 0x8000
    high_half = weight.view(torch.int16).to(torch.int32) - rounded_up.to(torch.int32)
    master = ((high_half << 16) | low_half).view(torch.float32)
    return master, (square & ~_SIGN).view(torch.float32)


def _bits(values: Tensor) -> Tensor:
    """Bits as int32; those of any NaN become the quiet one with an empty payload."""
    return torch.where(values.isnan(), _QUIET_NAN, values.view(torch.int32))


def _rounded(bits: Tensor) -> Tensor:
    """The high half after rounding to nearest even, in the low 16 bits of int32."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def check_tensors(master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, weight: Tensor | None) -> None:
    """Raise ``ValueError`` naming the first tensor that does not fit the contract of :func:`adamw_`."""
    low_bits = master.dtype == torch.int16
    weights: tuple[torch.dtype, ...] = (torch.bfloat16,) if low_bits else GRADIENT_DTYPES
    for name, tensor, dtypes in (
        ("master", master, (torch.float32, torch.int16)),
        ("exp_avg", exp_avg, (torch.float32,)),
        ("exp_avg_sq", exp_avg_sq, (torch.float32,)),
        ("gradient", gradient, GRADIENT_DTYPES),
        ("weight", weight, weights),
    ):
        if tensor is None:
            if low_bits:
                raise ValueError("weight is None: a master of low bits needs the BF16 weight that holds the high bits")
            continue
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected a flat contiguous "
                "tensor: pass a view(-1) of it"
            )
        if tensor.numel() != master.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, the master {master.numel()}")
        if tensor.device != master.device:
            raise ValueError(f"{name} is on {tensor.device}, the master on {master.device}")
