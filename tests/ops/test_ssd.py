"""The chunked SSD against the token-by-token recurrence: values, all gradients, states, boundaries, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed import documents
from torch import Tensor

from pretrain.ops import ssd_kernel
from pretrain.ops.ssd import ssd_chunked, ssd_recurrent_reference, ssd_step

NAMES = ["x", "dt", "A", "B", "C", "D", "initial_state"]


def make_inputs(
    L: int, B: int, H: int, P: int, G: int, N: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """x, dt, A, B, C, D, initial state, all leaves that ask for gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dt = torch.rand(L, B, H, generator=g, dtype=torch.float64) * 0.5
    A = -torch.rand(H, generator=g, dtype=torch.float64) * 4 - 0.1
    tensors = [normal(L, B, H, P), dt, A, normal(L, B, G, N), normal(L, B, G, N), normal(H), normal(B, H, P, N)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def outputs_and_gradients(function, inputs: list[Tensor], seq_idx: Tensor | None, **kwargs) -> list[Tensor]:
    x, dt, A, B, C, D, state = inputs
    y, final = function(x, dt, A, B, C, D, seq_idx_LB=seq_idx, initial_state_BHPN=state, **kwargs)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
    loss = (y.double() * weights).sum() + (final.double() ** 2).sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("chunks_at_once", [1, 2, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("L", "G", "chunk_size"), [(13, 1, 4), (13, 4, 4), (32, 2, 8), (5, 2, 8), (17, 1, 1), (1, 4, 64)]
)
def test_values_and_gradients_equal_the_recurrence(L, G, chunk_size, packed, chunks_at_once, monkeypatch):
    # CPU takes one chunk at once and accelerators all of them; both must be right.
    monkeypatch.setattr(ssd_kernel, "_chunks_at_once", lambda device: chunks_at_once)
    inputs = make_inputs(L, 3, 4, 5, G, 6)
    seq_idx = documents(L, 3) if packed else None
    got = outputs_and_gradients(ssd_chunked, inputs, seq_idx, chunk_size=chunk_size)
    want = outputs_and_gradients(ssd_recurrent_reference, inputs, seq_idx)
    for name, a, b in zip(["y", "final", *NAMES], got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@settings(deadline=None, max_examples=25)
@given(
    L=st.integers(1, 40),
    chunk_size=st.integers(1, 12),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
    packed=st.booleans(),
)
def test_any_length_and_chunk_size(L, chunk_size, groups, seed, packed):
    inputs = make_inputs(L, 2, 4, 3, groups, 2, seed=seed)
    seq_idx = documents(L, 2, seed) if packed else None
    with torch.no_grad():
        x, dt, A, B, C, D, state = inputs
        kwargs = {"seq_idx_LB": seq_idx, "initial_state_BHPN": state}
        y, final = ssd_chunked(x, dt, A, B, C, D, chunk_size=chunk_size, **kwargs)
        want_y, want_final = ssd_recurrent_reference(x, dt, A, B, C, D, **kwargs)
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, want_final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    inputs = make_inputs(7, 2, 2, 2, 1, 2)
    seq_idx = documents(7, 2) if packed else None

    def run(x, dt, A, B, C, D, state):
        return ssd_chunked(x, dt, A, B, C, D, seq_idx_LB=seq_idx, initial_state_BHPN=state, chunk_size=3)

    assert torch.autograd.gradcheck(run, inputs)


def test_without_skip_and_initial_state():
    x, dt, A, B, C, _, _ = make_inputs(11, 2, 2, 3, 1, 4)
    y, final = ssd_chunked(x, dt, A, B, C, chunk_size=4)
    want_y, want_final = ssd_recurrent_reference(x, dt, A, B, C)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, want_final, rtol=1e-12, atol=1e-12)


def test_float32_and_bfloat16_are_as_near_as_their_rounding():
    exact = make_inputs(150, 2, 4, 16, 2, 8)
    for dtype, tolerance in [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)]:
        low = [t.detach().to(dtype).requires_grad_() for t in exact]
        rounded = [t.detach().double().requires_grad_() for t in low]
        got = outputs_and_gradients(ssd_chunked, low, None)
        want = outputs_and_gradients(ssd_recurrent_reference, rounded, None)
        assert got[0].dtype == dtype
        assert got[1].dtype == torch.float32
        for name, a, b in zip(["y", "final", *NAMES], got, want, strict=True):
            error = (a.double() - b).abs().max() / b.abs().max()
            assert error < tolerance, (dtype, name, error.item())


def test_halves_joined_by_the_state_equal_the_whole():
    x, dt, A, B, C, D, state = (t.detach() for t in make_inputs(50, 2, 4, 3, 2, 5))
    seq_idx = torch.zeros(50, 2, dtype=torch.int64)
    seq_idx[10:], seq_idx[37:, 1] = 1, 2
    whole, end = ssd_chunked(x, dt, A, B, C, D, seq_idx_LB=seq_idx, initial_state_BHPN=state, chunk_size=8)
    parts = []
    for part in (slice(0, 21), slice(21, 50)):
        y, state = ssd_chunked(
            x[part], dt[part], A, B[part], C[part], D,
            seq_idx_LB=seq_idx[part], initial_state_BHPN=state, chunk_size=8,
        )  # fmt: skip
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


def test_steps_continue_a_chunked_prefix():
    x, dt, A, B, C, D, _ = (t.detach() for t in make_inputs(30, 2, 4, 3, 2, 5, dtype=torch.float32))
    whole, end = ssd_chunked(x, dt, A, B, C, D, chunk_size=8)
    _, state = ssd_chunked(x[:20], dt[:20], A, B[:20], C[:20], D, chunk_size=8)
    for t in range(20, 30):
        y, state = ssd_step(state, x[t], dt[t], A, B[t], C[t], D)
        torch.testing.assert_close(y, whole[t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_between_documents():
    """Other neighbours in the packed row change no bit of a document's outputs and gradients."""
    L, cut = 40, slice(13, 29)
    inputs = make_inputs(L, 1, 2, 3, 1, 4, dtype=torch.float32)
    seq_idx = torch.zeros(L, 1, dtype=torch.int64)
    seq_idx[13:], seq_idx[29:] = 1, 2
    results = []
    for disturbance in (0.0, 1e4):
        x, dt, A, B, C, D, _ = (t.detach().clone() for t in inputs)
        for tensor in (x, B, C):
            tensor[:13] += disturbance
            tensor[29:] += disturbance
        x.requires_grad_()
        dt.requires_grad_()
        y, _ = ssd_chunked(x, dt, A, B, C, D, seq_idx_LB=seq_idx, chunk_size=8)
        dx, ddt = torch.autograd.grad(y[cut].square().sum(), [x, dt])
        results.append((y[cut].detach(), dx, ddt))
        assert dx[:13].count_nonzero() == 0
        assert dx[29:].count_nonzero() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_returning_document_number_is_a_new_document():
    x, dt, A, B, C, D, _ = make_inputs(12, 1, 2, 3, 1, 4)
    there_and_back = torch.tensor([0] * 4 + [1] * 4 + [0] * 4)[:, None]
    distinct = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)[:, None]
    first, _ = ssd_chunked(x, dt, A, B, C, D, seq_idx_LB=there_and_back, chunk_size=16)
    second, _ = ssd_chunked(x, dt, A, B, C, D, seq_idx_LB=distinct, chunk_size=16)
    assert torch.equal(first, second)


@pytest.mark.parametrize("largest_dt", [0.0, 30.0, 1e4])
def test_extreme_steps_stay_finite_and_exact(largest_dt):
    """dt = 0 everywhere, and single tokens whose decay (up to exp(-1e5)) wipes the state, among ordinary ones."""
    double = make_inputs(70, 1, 2, 3, 1, 4)
    with torch.no_grad():
        double[2].copy_(torch.tensor([-10.0, -0.5]))
        if largest_dt:
            double[1][5::7] = largest_dt
        else:
            double[1].zero_()
    single = [t.detach().float().requires_grad_() for t in double]
    double = [t.detach().double().requires_grad_() for t in single]
    got = outputs_and_gradients(ssd_chunked, single, None, chunk_size=32)
    want = outputs_and_gradients(ssd_recurrent_reference, double, None)
    for name, a, b in zip(["y", "final", *NAMES], got, want, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error < 1e-5, (name, error.item())


def test_tokens_that_wipe_the_state_put_no_noise_into_the_gradient_of_decay():
    """Their own decays, exp(-5e5), have no gradient; noise times their large dt would bury that of the others."""
    double = make_inputs(64, 1, 1, 8, 1, 4)
    with torch.no_grad():
        double[2].fill_(-1e6)
        double[1].mul_(1e-6)
        double[1][5::16] = 0.5
    single = [t.detach().float().requires_grad_() for t in double]
    double = [t.detach().double().requires_grad_() for t in single]
    got = outputs_and_gradients(ssd_chunked, single, None)
    want = outputs_and_gradients(ssd_recurrent_reference, double, None)
    index = 2 + NAMES.index("A")
    torch.testing.assert_close(got[index].double(), want[index], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_strided_inputs_and_expanded_gradients(batch_first, chunk_size):
    """Inputs may be slices of one packed tensor, batch-first in memory; the incoming gradient may be expanded."""
    L, B, H, P, N = 20, 2, 4, 4, 4
    dt, A, _, _, D = make_inputs(L, B, H, P, 1, N)[1:6]
    order = (B, L) if batch_first else (L, B)
    packed = torch.randn(*order, H * P + 2 * N, dtype=torch.float64, requires_grad=True)
    results = []
    for function, kwargs in ((ssd_chunked, {"chunk_size": chunk_size}), (ssd_recurrent_reference, {})):
        source = packed.transpose(0, 1) if batch_first else packed
        x, keys, queries = source.split([H * P, N, N], dim=-1)
        y, _ = function(x.unflatten(-1, (H, P)), dt, A, keys[:, :, None], queries[:, :, None], D, **kwargs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype)
        weights = weights.view(B, L, H, P).transpose(0, 1) if batch_first else torch.ones((), dtype=y.dtype)
        results.append(torch.autograd.grad(y, [packed, dt, A, D], weights.expand_as(y)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (5, 2, 3)}, "dt has shape"),
        ({"A": (3,)}, "A has shape"),
        ({"B": (5, 2, 3, 4), "C": (5, 2, 3, 4)}, "4 heads cannot share 3 groups"),
        ({"C": (5, 2, 2, 7)}, "C has shape"),
        ({"initial_state": (2, 4, 4, 3)}, "initial_state has shape"),
        ({"x": (0, 2, 4, 3)}, "non-empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {
        "x": (5, 2, 4, 3), "dt": (5, 2, 4), "A": (4,), "B": (5, 2, 2, 4), "C": (5, 2, 2, 4), "D": (4,),
        "initial_state": (2, 4, 3, 4),
    }  # fmt: skip
    x, dt, A, B, C, D, state = (torch.zeros(change.get(name, shapes[name])) for name in NAMES)
    with pytest.raises(ValueError, match=message):
        ssd_chunked(x, dt, A, B, C, D, initial_state_BHPN=state)
