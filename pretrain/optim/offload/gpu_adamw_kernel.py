"""The Triton kernel of :mod:`~pretrain.optim.offload.gpu_adamw`: imports triton, so it is imported by first use only.

With ``EXPLICIT`` (NVIDIA) every operation is the PTX instruction that rounds to nearest and keeps subnormal numbers:
an explicit rounding keeps the assembler from fusing product and sum, and ``div_rn`` and ``sqrt_rn`` of older Triton
versions flush subnormals (triton-lang/triton, pull request 8557). Without it (ROCm, Triton's interpreter) Triton's own
operations are used; the launch turns their fusion off.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mul(a, b, EXPLICIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXPLICIT:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    return a * b


@triton.jit
def _add(a, b, EXPLICIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXPLICIT:
        return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    return a + b


@triton.jit
def _sub(a, b, EXPLICIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXPLICIT:
        return tl.inline_asm_elementwise("sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    return a - b


@triton.jit
def _div(a, b, EXPLICIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXPLICIT:
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    return tl.div_rn(a, b)


@triton.jit
def _sqrt(a, EXPLICIT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXPLICIT:
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    return tl.sqrt_rn(a)


@triton.jit
def adamw_kernel(  # type: ignore[no-untyped-def]
    master,  # FP32, or int16 with LOW_BITS
    exp_avg,
    exp_avg_sq,
    gradient,  # FP32, FP16, or bits of BF16 as int16
    weight,  # WEIGHT 0: not touched; 1: bits of BF16 as int16; 2: FP16 or FP32
    count,
    grad_scale,
    beta1,  # part of the scalars; the first moment needs only w1
    w1,
    beta2,
    w2,
    decay,
    step_size,
    inv_root,
    eps,
    LOW_BITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    EXPLICIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0)
    if gradient.dtype.element_ty == tl.int16:
        g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        g = g.to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    if LOW_BITS:
        low = tl.load(master + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
        high = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
        square = v.to(tl.int32, bitcast=True)
        tie_up = (square < 0).to(tl.int32)
        rounded_up = ((low + tie_up) > 0x8000).to(tl.int32)
        p = (((high - rounded_up) << 16) | low).to(tl.float32, bitcast=True)
        v = (square & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    else:
        p = tl.load(master + at, mask=inside, other=0.0)

    g = _mul(g, grad_scale, EXPLICIT)
    m = _add(m, _mul(_sub(g, m, EXPLICIT), w1, EXPLICIT), EXPLICIT)
    v = _add(_mul(v, beta2, EXPLICIT), _mul(_mul(g, g, EXPLICIT), w2, EXPLICIT), EXPLICIT)
    p = _mul(p, decay, EXPLICIT)
    root = _add(_mul(_sqrt(v, EXPLICIT), inv_root, EXPLICIT), eps, EXPLICIT)
    p = _sub(p, _mul(_div(m, root, EXPLICIT), step_size, EXPLICIT), EXPLICIT)

    tl.store(exp_avg + at, m, mask=inside)
    if WEIGHT == 1:
        bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
        odd = (bits >> 16) & 1
        tl.store(weight + at, ((bits + 0x7FFF + odd) >> 16).to(tl.int16), mask=inside)
        if LOW_BITS:
            low = bits & 0xFFFF
            tl.store(master + at, low.to(tl.int16), mask=inside)
            square = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            v = (square | tl.where(low == 0x8000, odd << 31, 0)).to(tl.float32, bitcast=True)
    if not LOW_BITS:
        tl.store(master + at, p, mask=inside)
        if WEIGHT == 2:
            tl.store(weight + at, p.to(weight.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
