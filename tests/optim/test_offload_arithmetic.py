"""The specified update of AdamW: against float-by-float NumPy, torch.optim.AdamW, and the low-bits encoding."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.offload_arithmetic import HYPER, adversarial_state, assert_same_bits, numpy_adamw, random_bits
from torch import Tensor

from pretrain.optim.offload.arithmetic import (
    CHUNK,
    StepScalars,
    adamw_,
    join_master,
    round_to_bf16,
    split_master,
)


def ordered(bits: Tensor) -> Tensor:
    """Bits of non-NaN BF16 as integers in the order of the numbers."""
    wide = bits.to(torch.int32) & 0xFFFF
    return torch.where(wide >= 0x8000, 0x8000 - wide, wide)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_specification_equals_numpy_float_by_float(gradient_dtype: torch.dtype, step: int) -> None:
    state = adversarial_state(gradient_dtype)
    scalars = StepScalars.of(step=step, grad_scale=0.3, **HYPER)
    expected = numpy_adamw(state.master, state.exp_avg, state.exp_avg_sq, state.gradient, scalars)
    weight = torch.empty(state.master.numel(), dtype=torch.bfloat16)
    adamw_(state.master, state.exp_avg, state.exp_avg_sq, state.gradient, weight, scalars)
    for ours, theirs in zip((state.master, state.exp_avg, state.exp_avg_sq, weight), expected, strict=True):
        assert_same_bits(ours, theirs)


def test_scalars_are_rounded_once_from_float64() -> None:
    scalars = StepScalars.of(
        step=2, learning_rate=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, grad_scale=1 / 3
    )
    assert scalars.w1 == float(np.float32(1 - 0.9)) != float(np.float32(1) - np.float32(0.9))
    assert scalars.step_size == float(np.float32(0.1 / (1 - 0.9**2)))
    assert scalars.inv_root == float(np.float32(1 / math.sqrt(1 - 0.95**2)))
    assert scalars.decay == float(np.float32(1 - 0.1 * 0.01))
    assert scalars.grad_scale == float(np.float32(1 / 3))


def test_a_grad_scale_beyond_fp32_is_infinite_rather_than_an_error() -> None:
    assert StepScalars.of(step=1, grad_scale=1e300, **HYPER).grad_scale == math.inf


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"step": 0}, "step = 0"), ({"betas": (0.9, 1.0)}, "betas"), ({"betas": (-0.1, 0.9)}, "betas")],
)
def test_scalars_of_no_step_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepScalars.of(**{"step": 1, **HYPER, **changed})


def test_a_chunk_border_changes_nothing() -> None:
    n = CHUNK + 3
    generator = torch.Generator().manual_seed(1)
    whole = [torch.rand(n, generator=generator) for _ in range(4)]
    tail = [tensor[-10:].clone() for tensor in whole]
    scalars = StepScalars.of(step=3, **HYPER)
    adamw_(*whole, None, scalars)
    adamw_(*tail, None, scalars)
    for a, b in zip(whole, tail, strict=True):
        assert_same_bits(a[-10:], b)


def test_rounding_to_bf16_agrees_with_torch_and_makes_one_nan() -> None:
    values = random_bits(200_000, seed=3)
    ties = torch.arange(0, 1 << 16, dtype=torch.int32) << 16 | 0x8000
    values = torch.cat([values, ties.view(torch.float32)])
    rounded = round_to_bf16(values)
    finite = ~values.isnan()
    assert_same_bits(rounded[finite], values[finite].bfloat16())
    assert (rounded[~finite].view(torch.int16) == 0x7FC0).all()
    assert (~finite).any()


def test_splitting_is_exact_for_every_pair_of_halves_that_matters() -> None:
    high = torch.arange(1 << 16, dtype=torch.int32)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        master = ((high << 16) | low).view(torch.float32)
        master = master[~master.isnan()]
        square = torch.full_like(master, 0.25)
        low_bits, weight, tagged = split_master(master, square)
        assert_same_bits(weight, master.bfloat16())
        assert torch.equal(tagged.abs(), square)
        joined, clean = join_master(low_bits, weight, tagged)
        assert_same_bits(joined, master)
        assert_same_bits(clean, square)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_splitting_random_masters_is_exact_and_nan_stays_nan(seed: int) -> None:
    master, square = random_bits(5000, seed), random_bits(5000, seed + 1).abs()
    joined, clean = join_master(*split_master(master, square))
    assert_same_bits(joined, master)
    assert_same_bits(clean, square)


def test_the_tie_bit_is_set_only_where_a_tie_was_rounded_up() -> None:
    master = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x3F817FFF], dtype=torch.int32).view(torch.float32)
    low, weight, tagged = split_master(master, torch.zeros(4))
    assert torch.signbit(tagged).tolist() == [False, True, False, False]
    assert (weight.view(torch.int16).to(torch.int32) & 0xFFFF).tolist() == [0x3F80, 0x3F82, 0x3F82, 0x3F81]
    # Split again from the tagged moment: nothing changes.
    for a, b in zip(split_master(master, tagged), (low, weight, tagged), strict=True):
        assert_same_bits(a, b)


def test_low_bits_take_the_same_steps_as_a_full_master() -> None:
    state = adversarial_state(torch.float32, finite=True)
    low, weight, tagged = split_master(state.master, state.exp_avg_sq)
    low_avg, full_weight = state.exp_avg.clone(), weight.clone()
    for step in range(1, 51):
        scalars = StepScalars.of(step=step, grad_scale=0.7, **HYPER)
        gradient = torch.sin(torch.arange(state.master.numel()) * (0.1 + step)) * 10.0 ** (step % 5 - 2)
        adamw_(state.master, state.exp_avg, state.exp_avg_sq, gradient, full_weight, scalars)
        adamw_(low, low_avg, tagged, gradient, weight, scalars)
        assert_same_bits(weight, full_weight)
    master, square = join_master(low, weight, tagged)
    assert_same_bits(master, state.master)
    assert_same_bits(square, state.exp_avg_sq)
    assert_same_bits(low_avg, state.exp_avg)


# The factor of weight decay, rounded to FP32, is off by up to 3e-8 in each of the 100 steps.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch_adamw_over_100_steps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    n, learning_rate = 4096, 1e-3
    master = torch.randn(n, generator=generator)
    reference = torch.nn.Parameter(master.to(dtype))
    settings_ = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([reference], lr=learning_rate, **settings_)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    for step in range(1, 101):
        gradient = torch.randn(n, generator=generator) * 10.0 ** (step % 4 - 3)
        scalars = StepScalars.of(step=step, learning_rate=learning_rate, **settings_)
        adamw_(master, exp_avg, exp_avg_sq, gradient, None, scalars)
        reference.grad = gradient.to(dtype)
        optimizer.step()
    torch.testing.assert_close(master.double(), reference.detach().double(), rtol=4e-6, atol=4e-6)
    moved = optimizer.state[reference]
    torch.testing.assert_close(exp_avg.double(), moved["exp_avg"].double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq.double(), moved["exp_avg_sq"].double(), rtol=1e-5, atol=1e-9)


def test_tensors_that_do_not_fit_are_named() -> None:
    scalars = StepScalars.of(step=1, **HYPER)
    good = {name: torch.zeros(8) for name in ("master", "exp_avg", "exp_avg_sq", "gradient")} | {"weight": None}
    wrong: list[tuple[dict, str]] = [
        ({"exp_avg": torch.zeros(8, dtype=torch.float64)}, r"exp_avg is torch\.float64"),
        ({"gradient": torch.zeros(8, dtype=torch.int32)}, r"gradient is torch\.int32"),
        ({"exp_avg_sq": torch.zeros(16)[::2]}, r"exp_avg_sq .*strides \(2,\)"),
        ({"gradient": torch.zeros(2, 4)}, r"gradient has shape \(2, 4\)"),
        ({"weight": torch.zeros(7)}, "weight has 7 elements, the master 8"),
        ({"master": torch.zeros(8, dtype=torch.int16)}, "weight is None"),
        ({"master": torch.zeros(8, dtype=torch.int16), "weight": torch.zeros(8)}, r"weight is torch\.float32"),
        ({"gradient": torch.zeros(8, device="meta")}, "gradient is on meta"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            adamw_(**(good | changed), scalars=scalars)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.int16])
def test_gpu_gives_the_bits_of_the_cpu(gradient_dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    from pretrain.optim.offload.cpu_adamw import cpu_adamw_
    from pretrain.optim.offload.gpu_adamw import gpu_adamw_

    state = adversarial_state(gradient_dtype, finite=True)
    arrays = state.arrays(weight_dtype)
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in arrays]
    on_gpu_in_torch = [None if tensor is None else tensor.clone() for tensor in on_gpu]
    for step in (1, 2, 3):
        scalars = StepScalars.of(step=step, grad_scale=0.3, **HYPER)
        cpu_adamw_(*arrays, scalars)
        gpu_adamw_(*on_gpu, scalars)
        adamw_(*on_gpu_in_torch, scalars)
        for ours, kernel, plain in zip(arrays, on_gpu, on_gpu_in_torch, strict=True):
            if ours is not None:
                assert_same_bits(kernel.cpu(), ours)
                assert_same_bits(plain.cpu(), ours)
