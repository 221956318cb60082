"""RMSNorm, plain and gated, against torch's, transformers' and the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pretrain.ops import blocks
from pretrain.ops.norm import gated_rms_norm, rms_norm


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def formula(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    gated = (y * z / (1 + torch.exp(-z))).unflatten(-1, (num_groups, -1))
    return (gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


def test_rms_norm_equals_torch(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 40)  # five rows at a time
    x, weight = make(7, 3, 8), make(8, seed=1)
    dy = make(7, 3, 8, seed=2).detach()
    got, want = rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out, [x, weight], dy) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_gated_equals_the_formula_and_its_gradients(num_groups, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 60)
    packed, y, weight = make(7, 3, 20), make(7, 3, 12, seed=1), make(12, seed=2)
    z = packed[..., 5:17]  # a slice of a packed projection
    dy = make(7, 3, 12, seed=3).detach()
    got, want = gated_rms_norm(y, z, weight, num_groups, 1e-4), formula(y, z, weight, num_groups, 1e-4)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    inputs = [packed, y, weight]
    for a, b in zip(*(torch.autograd.grad(out, inputs, dy) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    y, z, weight = make(3, 2, 6), make(3, 2, 6, seed=1), make(6, seed=2)
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 2), (y, z, weight))
    assert torch.autograd.gradcheck(rms_norm, (y, weight))


@pytest.mark.parametrize("num_groups", [1, 4])
def test_gated_equals_transformers(num_groups):
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    theirs = MambaRMSNormGated(16, group_size=16 // num_groups, eps=1e-5)
    weight = make(16, dtype=torch.float32)
    theirs.weight.data.copy_(weight)
    y, z = make(5, 2, 16, seed=1, dtype=torch.float32), make(5, 2, 16, seed=2, dtype=torch.float32)
    got, want = gated_rms_norm(y, z, weight, num_groups, 1e-5), theirs(y, z)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_is_as_near_as_its_rounding(dtype, tolerance):
    low = [make(60, 32, seed=s, dtype=dtype) for s in (0, 1)] + [make(32, seed=2, dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in low]
    got, want = gated_rms_norm(*low, 4), formula(*exact, 4, 1e-5)
    assert got.dtype == dtype
    dy = make(60, 32, seed=3, dtype=dtype).detach()
    gradients = torch.autograd.grad(got, low, dy)
    expected = torch.autograd.grad(want, exact, dy.double())
    for a, b in zip([got, *gradients], [want, *expected], strict=True):
        assert (a.double() - b).abs().max() / b.abs().max() < tolerance


def test_zero_rows_stay_zero_with_finite_gradients():
    y, z = (torch.zeros(2, 4, requires_grad=True) for _ in range(2))
    out = gated_rms_norm(y, z, torch.ones(4))
    assert out.count_nonzero() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [y, z]))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="3 groups do not divide the width 8"):
        gated_rms_norm(torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8), 3)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.zeros(2, 8), torch.ones(4))
    with pytest.raises(ValueError, match="its gate z is"):
        gated_rms_norm(torch.zeros(2, 8), torch.zeros(2, 4), torch.ones(8))
