"""Norm layers against torch's in float64 and against their formulas."""

import pytest
import torch

from pretrain.nn.initialisation import initialise
from pretrain.nn.norm import HeadRMSNorm, build_norm
from pretrain.nn.norm_config import NormConfig
from pretrain.parallel.layers import TorchLayers

KINDS = ["rms", "layer", "layer1p"]


def make_norm(kind, width=12, eps=1e-3):
    norm = build_norm(TorchLayers(), width, NormConfig(kind=kind, eps=eps))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return norm


def formula(kind, norm, x, eps=1e-3):
    """In the dtype of x."""
    weight = norm.weight.to(x.dtype)
    if kind == "rms":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return normed * (weight + 1 if kind == "layer1p" else weight) + norm.bias.to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_gradients_match_the_formula(kind):
    norm = make_norm(kind).double()
    x = (3 + torch.randn(5, 2, 12, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(5, 2, 12, dtype=torch.float64)
    found, expected = norm(x), formula(kind, norm, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, *norm.parameters()]) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("given", "wanted"), [("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_half_precision_is_that_of_the_formula_rounded_once(kind, given, wanted):
    """Also where the stream is kept in another precision than the parameters. Tolerance: one rounding to bf16."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    norm = make_norm(kind).bfloat16()
    x = (3 + torch.randn(50, 12)).to(dtypes[given]).requires_grad_()
    y = norm(x, dtypes[wanted])
    assert y.dtype == dtypes[wanted]
    rtol = 2**-8 if wanted == "bf16" else 1e-5
    exact_x = x.detach().double().requires_grad_()
    exact = formula(kind, norm, exact_x)
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=1e-5)
    weights = torch.randn(50, 12).to(y.dtype)
    found = torch.autograd.grad((y * weights).sum(), [x, *norm.parameters()])
    expected = torch.autograd.grad((exact * weights.double()).sum(), [exact_x, *norm.parameters()])
    assert found[0].dtype == x.dtype
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-7, atol=2**-7 * float(b.abs().max()))


def test_layer_norms_match_torch():
    x = torch.randn(5, 12)
    theirs = torch.nn.LayerNorm(12, eps=1e-3)
    for kind in ("layer", "layer1p"):
        norm = make_norm(kind)
        with torch.no_grad():
            theirs.weight.copy_(norm.weight + (kind == "layer1p"))
            theirs.bias.copy_(norm.bias)
        assert torch.equal(norm(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_norms_only_normalise(kind):
    norm = build_norm(TorchLayers(), 12, NormConfig(kind=kind))
    initialise(norm, norm.initialisers(), seed=0)
    y = norm(3 + 2 * torch.randn(40, 12))
    torch.testing.assert_close((y * y).mean(-1), torch.ones(40), rtol=1e-3, atol=1e-3)
    assert (float(y.detach().mean().abs()) < 1e-6) == (kind != "rms")
    assert all(parameter.no_weight_decay for parameter in norm.parameters())


def test_heads_are_normed_each_by_itself():
    norm = HeadRMSNorm(TorchLayers(), 6, 1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 2, 3, 6, dtype=torch.float64)
    for head in range(3):
        torch.testing.assert_close(norm(x)[:, :, head], formula("rms", norm, x[:, :, head]))


def test_a_layer_norm_refuses_vectors_of_another_width():
    norm = make_norm("layer")
    with pytest.raises(ValueError, match=r"layer_norm: weight has shape \(12,\), expected \(5,\)"):
        norm(torch.zeros(3, 5))
