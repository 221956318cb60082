"""The Mamba-1 mixer against transformers' with the same weights; packed documents; generation; initial values; cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.cost_case import check_cost
from torch.nn import functional as F  # noqa: N812
from transformers import MambaConfig as TheirConfig
from transformers.cache_utils import DynamicCache
from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMixer

from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mamba1 import Mamba1Mixer
from pretrain.nn.mamba1_config import Mamba1Config
from pretrain.nn.mixer_config import Place
from pretrain.parallel.layers import TorchLayers

WIDTH = 24


def pair(config: Mamba1Config, seed: int = 0) -> tuple[Any, Any]:
    """Ours and theirs, with the same weights, all away from their initial constants."""
    ours = Mamba1Mixer(TorchLayers(), WIDTH, config)
    theirs = TheirMixer(
        TheirConfig(
            hidden_size=WIDTH, state_size=config.state_dim, conv_kernel=config.conv_kernel, expand=config.expand,
            time_step_rank=config.rank(WIDTH), use_bias=config.proj_bias, use_conv_bias=config.conv_bias,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip
    initialise(ours, ours.initialisers(0.3, 0.3), seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = same_parameters(ours, theirs)
    assert {id(p) for p, _ in pairs} == {id(p) for p in ours.parameters()}
    assert {id(p) for _, p in pairs} == {id(p) for p in theirs.parameters()}
    with torch.no_grad():
        for parameter, copy in pairs:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            copy.copy_(parameter.view(copy.shape))
    return ours, theirs


def same_parameters(ours: Any, theirs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = [
        (ours.conv.weight, theirs.conv1d.weight),
        (ours.conv.bias, theirs.conv1d.bias),
        (ours.dt_bias, theirs.dt_proj.bias),
        (ours.A_log, theirs.A_log),
        (ours.D, theirs.D),
    ]
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        pairs.append((getattr(ours, name).weight, getattr(theirs, name).weight))
    for name in ("in_proj", "out_proj"):
        pairs.append((getattr(ours, name).bias, getattr(theirs, name).bias))
    return [(a, b) for a, b in pairs if a is not None]


def layout_of(x_LBD: torch.Tensor, seq_idx_LB: torch.Tensor | None = None) -> SequenceLayout:
    return SequenceLayout(x_LBD.shape[0], x_LBD.shape[1], x_LBD.device, seq_idx_LB)


@pytest.mark.parametrize(
    "config",
    [
        Mamba1Config(chunk_size=8),
        Mamba1Config(state_dim=5, dt_rank=3, conv_kernel=2, expand=3, proj_bias=True, conv_bias=False),
    ],
    ids=["default", "other"],
)
def test_outputs_and_gradients_equal_those_of_transformers(config):
    """fp32: 2e-5 of the largest element."""
    ours, theirs = pair(config)
    x_LBD = torch.randn(21, 2, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    dy_LBD = torch.randn(21, 2, WIDTH, generator=torch.Generator().manual_seed(2))
    pairs = same_parameters(ours, theirs)
    got = ours(x_LBD, layout_of(x_LBD))
    want = theirs(x_LBD.transpose(0, 1)).transpose(0, 1)
    dgot = torch.autograd.grad(got, [x_LBD, *(p for p, _ in pairs)], dy_LBD)
    dwant = torch.autograd.grad(want, [x_LBD, *(p for _, p in pairs)], dy_LBD)
    for a, b in zip([got, *dgot], [want, *dwant], strict=True):
        torch.testing.assert_close(a, b.view(a.shape), rtol=0, atol=2e-5 * float(b.detach().abs().max()))


def test_prefill_and_decoding_equal_transformers_and_the_whole_sequence():
    ours, theirs = pair(Mamba1Config(chunk_size=4))
    theirs.eval()
    x_LBD = torch.randn(17, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    cache = ours.init_cache(2, torch.float32, x_LBD.device)
    their_cache = DynamicCache(config=theirs.config)
    with torch.no_grad():
        whole = ours(x_LBD, layout_of(x_LBD))
        outputs = [ours(x_LBD[:9], layout_of(x_LBD[:9]), cache)]
        expected = [theirs(x_LBD[:9].transpose(0, 1), cache_params=their_cache).transpose(0, 1)]
        for t in range(9, 17):
            outputs.append(ours(x_LBD[t : t + 1], layout_of(x_LBD[t : t + 1]), cache))
            expected.append(theirs(x_LBD[t : t + 1].transpose(0, 1), cache_params=their_cache).transpose(0, 1))
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(outputs), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_separate_ones():
    ours, _ = pair(Mamba1Config(chunk_size=8))
    ours.double()
    lengths = [9, 1, 2, 12]
    x_LBD = torch.randn(24, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seq_idx = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])[:, None]
    packed = ours(x_LBD, layout_of(x_LBD, seq_idx))
    separate = torch.cat([ours(part, layout_of(part)) for part in x_LBD.split(lengths)])
    torch.testing.assert_close(packed, separate, rtol=1e-12, atol=1e-12)


def test_bf16_is_within_its_rounding_of_fp32():
    """A_log, D and dt_bias kept in fp32, the rest bf16: 3% of the largest element."""
    ours, _ = pair(Mamba1Config())
    x_LBD = torch.randn(40, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    want = ours(x_LBD, layout_of(x_LBD))
    for name, parameter in ours.named_parameters():
        if name not in ("A_log", "D", "dt_bias"):
            parameter.data = parameter.data.bfloat16()
    got = ours(x_LBD.bfloat16(), layout_of(x_LBD))
    assert got.dtype == torch.bfloat16
    assert float((got.detach().float() - want.detach()).abs().max()) < 0.03 * float(want.detach().abs().max())


def test_initial_values_are_those_of_the_authors():
    config = Mamba1Config()
    mixer = Mamba1Mixer(TorchLayers(), 256, config)
    initialise(mixer, mixer.initialisers(0.02, 0.005), seed=3)
    assert torch.equal(mixer.A_log, torch.arange(1, 17).float().log().expand(512, 16))
    assert torch.equal(mixer.D, torch.ones(512))
    step = F.softplus(mixer.dt_bias.detach())
    assert 1e-3 <= float(step.min()) < 1.1e-3
    assert 0.09 < float(step.max()) <= 0.1
    assert float(step.log().mean()) == pytest.approx(math.log(1e-2), abs=0.2)
    bound = 16**-0.5
    assert 0.99 * bound < float(mixer.dt_proj.weight.detach().abs().max()) <= bound
    assert float(mixer.out_proj.weight.std()) == pytest.approx(0.005, rel=0.05)
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias", "conv.bias"}
    kept = {name for name, p in mixer.named_parameters() if getattr(p, "keep_fp32", False)}
    assert kept == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [Mamba1Config(chunk_size=16), Mamba1Config(state_dim=6, dt_rank=5, proj_bias=True, conv_bias=False)]
)
def test_cost_is_what_the_module_does(config, dtype):
    check_cost(config, 32, dtype=dtype)


def test_impossible_sizes_are_named_with_a_fix():
    found = list(Mamba1Config(expand=0, state_dim=-1, conv_kernel=0, chunk_size=0, dt_rank=0).violations(32, 1))
    assert [fault[0] for fault in found] == ["expand", "state_dim", "conv_kernel", "chunk_size", "dt_rank"]
    ((field, value, rule, fix),) = Mamba1Config(dt_rank=65).violations(32, 1)
    assert (field, value) == ("dt_rank", 65)
    assert "inner channels (64" in rule
    assert "null for 2" in fix
    assert not list(Mamba1Config().parallel_violations(32, 4))
    ((field, value, rule, _),) = Mamba1Config(expand=1).parallel_violations(30, 4)
    assert (field, value) == ("expand", 1)
    assert "30" in rule
    assert "4 tensor-parallel ranks" in rule


def test_the_published_size_of_one_layer():
    """Of mamba-130m (width 768): 129,135,360 parameters less embedding (50,280 rows) and norms, over 24 layers."""
    layer = (129_135_360 - 50_280 * 768 - 25 * 768) / 24
    assert Mamba1Config().cost(Place(width=768), 2048).parameters == layer
