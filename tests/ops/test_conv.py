"""The short convolution against torch's conv1d, run on each document by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pretrain.ops import blocks
from pretrain.ops.conv import causal_conv, causal_conv_final_state, causal_conv_step


def make_inputs(L: int, B: int, C: int, K: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(L * 100 + K)
    shapes = [(L, B, C), (C, K), (C,), (K - 1, B, C)]
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def reference(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor, initial: Tensor) -> Tensor:
    """torch's conv1d over each document of each row; the first document starts from the initial state."""
    L, B, C = x.shape
    columns = []
    for b in range(B):
        changes = (seq_idx[1:, b] != seq_idx[:-1, b]).nonzero().flatten() + 1
        bounds = [0, *changes.tolist(), L]
        pieces = []
        for start, stop in itertools.pairwise(bounds):
            past = initial[:, b] if start == 0 else torch.zeros_like(initial[:, b])
            inputs = torch.cat([past, x[start:stop, b]]).t()[None]
            pieces.append(F.conv1d(inputs, weight[:, None], bias, groups=C)[0].t())
        columns.append(torch.cat(pieces))
    return F.silu(torch.stack(columns, dim=1))


def documents(L: int, B: int) -> Tensor:
    g = torch.Generator().manual_seed(L)
    return torch.randint(-1, 6, (L, B), generator=g).sort(0, descending=True)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("L", "K"), [(40, 4), (2, 4), (3, 4), (4, 4), (9, 2), (5, 1)])
def test_values_and_gradients_equal_conv1d(L, K, packed, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 7 * 3 * 5)  # several blocks of 7 rows, the last one shorter
    inputs = make_inputs(L, 3, 5, K)
    x, weight, bias, initial = inputs
    seq_idx = documents(L, 3) if packed else torch.zeros(L, 3, dtype=torch.int64)
    y = causal_conv(x, weight, bias, seq_idx_LB=seq_idx if packed else None, initial_state_KBC=initial)
    want = reference(x, weight, bias, seq_idx, initial)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    dy = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    got, expected = (torch.autograd.grad(out, inputs, dy, allow_unused=True) for out in (y, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-10, atol=1e-10)


def test_gradcheck_with_documents_of_one_token():
    inputs = make_inputs(9, 2, 2, 4)
    seq_idx = torch.tensor([0, 1, 2, 2, 2, 2, 2, 3, -1])[:, None].expand(9, 2)

    def run(x, weight, bias, initial):
        return causal_conv(x, weight, bias, seq_idx_LB=seq_idx, initial_state_KBC=initial)

    assert torch.autograd.gradcheck(run, inputs)


def test_nothing_leaks_between_documents():
    x, weight, bias, _ = make_inputs(20, 1, 3, 4, torch.float32)
    seq_idx = torch.zeros(20, 1, dtype=torch.int64)
    seq_idx[8:] = 1
    disturbed = x.detach().clone()
    disturbed[:8] = float("inf")
    y, other = (causal_conv(t, weight, bias, seq_idx_LB=seq_idx) for t in (x, disturbed))
    assert torch.equal(y[8:], other[8:])
    assert torch.autograd.grad(y[8:].sum(), x)[0][:8].count_nonzero() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_and_strided_input(dtype, tolerance):
    wide = make_inputs(50, 2, 12, 4, dtype)[0]
    _, weight, bias, initial = make_inputs(50, 2, 6, 4, dtype)
    results = []
    for cast in (lambda t: t, lambda t: t.detach().double().requires_grad_()):
        tensors = [cast(t) for t in (wide, weight, bias, initial)]
        y = causal_conv(tensors[0][..., 3:9], *tensors[1:3], initial_state_KBC=tensors[3])
        results.append([y, *torch.autograd.grad(y.double().square().sum(), tensors)])
    assert results[0][0].dtype == dtype
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).abs().max() / b.abs().max() < tolerance


@pytest.mark.parametrize("split", [1, 2, 3, 7])
def test_steps_and_pieces_continue_a_prefix(split):
    x, weight, bias, _ = (t.detach() for t in make_inputs(12, 2, 3, 4))
    whole = causal_conv(x, weight, bias)
    state = causal_conv_final_state(x[:split], 4)
    rest = causal_conv(x[split:], weight, bias, initial_state_KBC=state)
    torch.testing.assert_close(rest, whole[split:], rtol=1e-12, atol=1e-12)
    for t in range(split, 12):
        y, state = causal_conv_step(state, x[t], weight, bias)
        torch.testing.assert_close(y, whole[t], rtol=1e-12, atol=1e-12)
    assert torch.equal(state, x[-3:])


def test_final_state_holds_only_the_last_document():
    x = make_inputs(6, 2, 3, 4)[0].detach()
    seq_idx = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1], [0, 1], [2, 1]])
    state = causal_conv_final_state(x, 4, seq_idx_LB=seq_idx)
    assert torch.equal(state[:, 1], x[3:, 1])
    assert torch.equal(state[2, 0], x[5, 0])
    assert state[:2, 0].count_nonzero() == 0


def test_shapes_that_do_not_fit_are_named():
    x = torch.zeros(5, 2, 3)
    with pytest.raises(ValueError, match="do not fit 3 channels"):
        causal_conv(x, torch.zeros(4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"seq_idx \(2, 5\), expected \(5, 2\)"):
        causal_conv(x, torch.zeros(3, 4), torch.zeros(3), seq_idx_LB=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv(x, torch.zeros(3, 4), torch.zeros(3), initial_state_KBC=torch.zeros(4, 2, 3))
