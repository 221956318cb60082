"""Residual layers of each wiring against their written-out formulas."""

import pytest
import torch
from torch import nn

from pretrain.nn.block import BLOCKS, build_block
from pretrain.nn.initialisation import constant, initialise, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.norm_config import NormConfig
from pretrain.parallel.layers import TorchLayers

LAYOUT = SequenceLayout(5, 2, torch.device("cpu"))
EPS = 1e-3


class Squaring(nn.Module):
    """A mixer that is not linear and records what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))
        self.steps = nn.Parameter(torch.empty(8))
        self.given = None

    def initialisers(self, std, out_std):
        return {"weight": normal(out_std), "steps": constant(std)}

    def forward(self, x_LBD, layout, cache=None):
        self.given = x_LBD, layout, cache
        y = x_LBD @ self.weight.to(x_LBD.dtype)
        return y * y


def make_block(placement, kind="rms"):
    block = build_block(TorchLayers(), 8, NormConfig(kind=kind, placement=placement, eps=EPS), Squaring())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return block


def normed(x, norm):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * norm.weight


def gru(x, y, gate):
    (wr, wz, wh), (ur, uz, uh) = (matrix.double().chunk(3) for matrix in (gate.W, gate.U))
    r = torch.sigmoid(y @ wr.T + x @ ur.T)
    z = torch.sigmoid(y @ wz.T + x @ uz.T - gate.bias)
    return (1 - z) * x + z * torch.tanh(y @ wh.T + (r * x) @ uh.T)


FORMULAS = {
    "pre": lambda x, f, block: x + f(normed(x, block.norm)),
    "post": lambda x, f, block: normed(x + f(x), block.norm),
    "peri": lambda x, f, block: x + normed(f(normed(x, block.norm)), block.out_norm),
    "gru": lambda x, f, block: gru(x, torch.relu(f(normed(x, block.norm))), block.gate),
}


@pytest.mark.parametrize("placement", FORMULAS)
def test_wiring_matches_the_formula(placement):
    block = make_block(placement).double()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    cache = object()
    y = block(x, LAYOUT, cache)
    assert block.mixer.given[1:] == (LAYOUT, cache)
    expected = FORMULAS[placement](x, lambda x: (x @ block.mixer.weight) ** 2, block)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_every_wiring_has_a_formula_here():
    assert BLOCKS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("placement", BLOCKS)
@pytest.mark.parametrize("kind", ["rms", "layer1p"])
def test_every_parameter_has_a_name_an_initialiser_and_a_cost(placement, kind):
    block = make_block(placement, kind)
    initialise(block, block.initialisers(0.5, 0.02), seed=0)
    assert torch.equal(block.mixer.steps.detach(), torch.full((8,), 0.5))
    assert 0.01 < float(block.mixer.weight.detach().std()) < 0.03
    names = [name for name, _ in block.named_parameters() if not name.startswith(("mixer.", "gate."))]
    fields = ["weight"] if kind == "rms" else ["weight", "bias"]
    norms = {"pre": ["norm"], "post": ["norm"], "peri": ["norm", "out_norm"], "gru": ["norm"]}[placement]
    assert names == [f"{norm}.{field}" for norm in norms for field in fields]
    config = NormConfig(kind=kind, placement=placement)
    own = sum(parameter.numel() for name, parameter in block.named_parameters() if not name.startswith("mixer."))
    assert config.layer_cost(8).parameters == own


@pytest.mark.parametrize("placement", BLOCKS)
def test_a_wider_stream_meets_a_mixer_in_its_own_precision(placement):
    """The stream stays in fp32 around a bf16 mixer of which one parameter is kept in fp32, and gains by it."""
    block = make_block(placement).bfloat16()
    block.mixer.steps.data = block.mixer.steps.data.float()
    x = torch.randn(5, 2, 8)
    y = block(x, LAYOUT)
    assert block.mixer.given[0].dtype == torch.bfloat16
    assert y.dtype == torch.float32
    f = block.mixer(block.mixer.given[0], LAYOUT).double()
    expected = {
        "pre": lambda: x.double() + f,
        "post": lambda: normed(x.double() + f, block.norm),
        "peri": lambda: x.double() + normed(f, block.out_norm).bfloat16(),
        "gru": lambda: gru(x.double(), torch.relu(f), block.gate),
    }[placement]()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 if placement in ("pre", "post") else 5e-2)
    assert block(x.bfloat16(), LAYOUT).dtype == torch.bfloat16
