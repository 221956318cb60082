"""The chunked selective scan against the token-by-token recurrence: values, all gradients, states, boundaries,
extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed import documents
from torch import Tensor

from pretrain.ops import selective_scan_kernel
from pretrain.ops.selective_scan import selective_scan, selective_scan_reference, selective_scan_step

NAMES = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"]


def make_inputs(L: int, B: int, inner: int, N: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """As NAMES, all leaves that ask for gradients; dt is raw, to go through softplus."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = -torch.rand(inner, N, generator=g, dtype=torch.float64) * 4 - 0.1
    tensors = [normal(L, B, inner), normal(L, B, inner) - 1, A, normal(L, B, N), normal(L, B, N), normal(inner)]
    tensors += [normal(L, B, inner), normal(inner), normal(B, inner, N)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def outputs_and_gradients(function, inputs: list[Tensor], seq_idx: Tensor | None, **kwargs) -> list[Tensor]:
    x, dt, A, B, C, D, z, bias, state = inputs
    y, final = function(
        x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, seq_idx_LB=seq_idx, initial_state_BIN=state,
        **kwargs,
    )  # fmt: skip
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
    loss = (y.double() * weights).sum() + (final.double() ** 2).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, inputs)]


def assert_equal_to(want: list[Tensor], got: list[Tensor], tolerance: float) -> None:
    """Largest difference relative to the largest element."""
    for name, a, b in zip(["y", "final", *NAMES], got, want, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("chunks_at_once", [1, 2, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("L", "inner", "N", "chunk_size"), [(13, 5, 3, 4), (32, 70, 4, 8), (5, 2, 1, 1), (1, 4, 3, 64)]
)
def test_values_and_gradients_equal_the_recurrence(L, inner, N, chunk_size, packed, chunks_at_once, monkeypatch):
    # Accelerators take all chunks at once, CPU one or, of small models, several; and 70 channels are two blocks.
    monkeypatch.setattr(selective_scan_kernel, "_chunks_at_once", lambda device, numbers: chunks_at_once)
    monkeypatch.setattr(selective_scan_kernel, "CPU_POSITION_NUMBERS", 1)
    inputs = make_inputs(L, 3, inner, N)
    seq_idx = documents(L, 3) if packed else None
    got = outputs_and_gradients(selective_scan, inputs, seq_idx, chunk_size=chunk_size)
    assert_equal_to(outputs_and_gradients(selective_scan_reference, inputs, seq_idx), got, 1e-13)


def test_the_recurrence_is_the_papers_formula():
    """Scalar loops over equation 2 with zero-order hold of A and Euler's B, as the authors compute it."""
    L, inner, N = 4, 2, 3
    x, dt, A, B, C, D, z, bias, _ = [t.detach() for t in make_inputs(L, 1, inner, N)]
    got, _ = selective_scan_reference(x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True)
    for i in range(inner):
        h = [0.0] * N
        for t in range(L):
            step = math.log1p(math.exp(float(dt[t, 0, i] + bias[i])))
            h = [math.exp(step * A[i, n]) * h[n] + step * float(B[t, 0, n] * x[t, 0, i]) for n in range(N)]
            y = sum(float(C[t, 0, n]) * h[n] for n in range(N)) + float(D[i] * x[t, 0, i])
            gate = float(z[t, 0, i]) / (1 + math.exp(-float(z[t, 0, i])))
            assert got[t, 0, i] == pytest.approx(y * gate, rel=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_against_finite_differences(packed):
    inputs = make_inputs(7, 2, 3, 2)
    seq_idx = documents(7, 2) if packed else None

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, z, bias, state = tensors
        return selective_scan(
            x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, seq_idx_LB=seq_idx, initial_state_BIN=state,
            chunk_size=3,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7)


def test_optional_inputs_may_be_left_out():
    x, dt, A, B, C = make_inputs(9, 2, 3, 2)[:5]
    dt = dt.detach().exp().requires_grad_()
    results = [
        torch.autograd.grad(function(x, dt, A, B, C)[0].square().sum(), [x, dt, A, B, C])
        for function in (selective_scan, selective_scan_reference)
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(L=st.integers(1, 40), chunk_size=st.integers(1, 45), cut=st.integers(0, 39), seed=st.integers(0, 99))
def test_any_length_chunk_and_place_to_continue_give_the_same(L, chunk_size, cut, seed):
    """Chunk sizes that do not divide the length; the final state of a part is the initial state of the rest."""
    x, dt, A, B, C, D, z, bias, state = [t.detach() for t in make_inputs(L, 2, 4, 3, seed=seed)]
    common = {"dt_bias_I": bias, "dt_softplus": True, "chunk_size": chunk_size}
    want, final = selective_scan_reference(
        x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, initial_state_BIN=state
    )
    cut = min(cut, L - 1)
    outputs = []
    for part in ([slice(0, cut)] if cut else []) + [slice(cut, L)]:
        y, state = selective_scan(
            x[part], dt[part], A, B[part], C[part], D, z_LBI=z[part], initial_state_BIN=state, **common
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunks_at_once", [1, None])
def test_packed_documents_are_bit_for_bit_independent_of_each_other(chunks_at_once, monkeypatch):
    """Whatever the other documents hold, output and gradients of one do not change in a single bit."""
    monkeypatch.setattr(selective_scan_kernel, "_chunks_at_once", lambda device, numbers: chunks_at_once)
    seq_idx = torch.tensor([0] * 11 + [1] * 6 + [2] * 8)[:, None]
    own = slice(11, 17)
    results = []
    for other in (1.0, 1e12):
        inputs = make_inputs(25, 1, 4, 3, torch.float32)[:8]
        x, dt, A, B, C, D, z, bias = inputs
        with torch.no_grad():
            for tensor in (x, B, C):
                outside = torch.ones(25, dtype=torch.bool)
                outside[own] = False
                tensor[outside] *= other
        y, _ = selective_scan(
            x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, seq_idx_LB=seq_idx, chunk_size=4
        )
        grads = torch.autograd.grad(y[own].sum(), [x, dt, B, C, z, A])
        assert not any(gradient[:11].any() or gradient[17:].any() for gradient in grads[:5])
        results.append([y[own], *(gradient[own] for gradient in grads[:5]), grads[5]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precisions_against_float64(dtype, tolerance):
    """A, D and bias stay fp32, as in training; relative to the largest element. bf16: half a unit in the last of its
    8 bits is 4e-3, and dB and dC are sums of rounded numbers.
    """
    wide = make_inputs(130, 2, 24, 8, torch.float32)
    single = [
        t.detach().to(dtype if name in ("x", "dt", "B", "C", "z") else torch.float32).requires_grad_()
        for name, t in zip(NAMES, wide, strict=True)
    ]
    double = [t.detach().double().requires_grad_() for t in single]
    seq_idx = documents(130, 2)
    got = outputs_and_gradients(selective_scan, single, seq_idx, chunk_size=32)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert [g.dtype for g in got[2:]] == [t.dtype for t in single]
    assert_equal_to(outputs_and_gradients(selective_scan_reference, double, seq_idx), got, tolerance)


@pytest.mark.parametrize("raw_step", [-200.0, 200.0, 1e4])
def test_steps_from_zero_to_those_that_wipe_the_state(raw_step):
    """Sums of exponents far beyond what a float holds as a factor, at single tokens among ordinary ones."""
    double = make_inputs(70, 1, 3, 4)
    with torch.no_grad():
        double[1][5::7] = raw_step
    single = [t.detach().float().requires_grad_() for t in double]
    double = [t.detach().double().requires_grad_() for t in single]
    got = outputs_and_gradients(selective_scan, single, None)
    assert all(t.isfinite().all() for t in got)
    assert_equal_to(outputs_and_gradients(selective_scan_reference, double, None), got, 1e-5)


def test_strided_inputs_and_gradients():
    """Slices of packed projections, batch-first in memory, and an expanded incoming gradient."""
    L, B, inner, N = 20, 2, 4, 3
    bias = make_inputs(L, B, inner, N)[7]
    A = -torch.ones(inner, N, dtype=torch.float64)
    packed = torch.randn(B, L, 3 * inner + 2 * N, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (selective_scan, selective_scan_reference):
        x, dt, z, keys, queries = packed.transpose(0, 1).split([inner, inner, inner, N, N], dim=-1)
        y, _ = function(x, dt, A, keys, queries, z_LBI=z, dt_bias_I=bias, dt_softplus=True)
        results.append(torch.autograd.grad(y, packed, torch.ones((), dtype=y.dtype).expand_as(y)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_the_backward_keeps_one_state_a_chunk():
    """What autograd holds besides the inputs does not grow with L * I * N."""
    L, inner, N, chunk = 256, 8, 64, 32
    inputs = make_inputs(L, 1, inner, N, torch.float32)
    given = {t.untyped_storage().data_ptr() for t in inputs}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.numel())
        return tensor

    x, dt, A, B, C, D, z, bias, _ = inputs
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, chunk_size=chunk)
    assert sum(kept) == (L // chunk + 1) * inner * N


def test_one_position_at_a_time_equals_the_whole():
    x, dt, A, B, C, D, z, bias, state = [t.detach() for t in make_inputs(6, 2, 4, 3)]
    want, final = selective_scan(x, dt, A, B, C, D, z_LBI=z, dt_bias_I=bias, dt_softplus=True, initial_state_BIN=state)
    for t in range(6):
        y, state = selective_scan_step(
            state, x[t], dt[t], A, B[t], C[t], D, z_BI=z[t], dt_bias_I=bias, dt_softplus=True
        )
        torch.testing.assert_close(y, want[t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_shapes_that_do_not_fit_are_named_all_together():
    x, dt, A, B, C, D, z, _, state = make_inputs(5, 2, 3, 4)
    with pytest.raises(ValueError, match=r"dt has shape \(4, 2, 3\).*C has shape .*chunk_size is 0") as error:
        selective_scan(x, dt[1:], A, B, C[..., :2], D, z_LBI=z, initial_state_BIN=state, chunk_size=0)
    assert "dt_bias" not in str(error.value)
    with pytest.raises(ValueError, match="non-empty"):
        selective_scan(x[:0], dt[:0], A, B[:0], C[:0])
