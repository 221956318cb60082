"""Mamba-2 mixer against transformers' Mamba2Mixer with the same weights."""

import pytest
import torch
from support.cost_case import check_cost

from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mamba2 import Mamba2Mixer
from pretrain.nn.mamba2_config import Mamba2Config
from pretrain.parallel.layers import TorchLayers

CPU = torch.device("cpu")
WIDTH, INNER, HEAD_DIM, STATE, KERNEL = 24, 48, 8, 10, 4


def make_mixer(num_groups=1, dtype=torch.float32, **options):
    sizes = {"head_dim": HEAD_DIM, "state_dim": STATE, "groups": num_groups, "conv_kernel": KERNEL, "chunk_size": 8}
    mixer = Mamba2Mixer(TorchLayers(), WIDTH, Mamba2Config(**sizes, **options), norm_eps=1e-5)
    initialise(mixer, mixer.initialisers(std=0.3, out_std=0.3), seed=0)
    with torch.no_grad():  # ones would hide a mistake
        mixer.D.uniform_(-1, 1)
        mixer.norm.weight.uniform_(0.5, 1.5)
        for layer in (mixer.in_proj, mixer.out_proj):
            if layer.bias is not None:
                layer.bias.uniform_(-1, 1)
    return mixer.to(dtype)


def transformers_mixer(mixer, num_groups, dt_limit=(0.0, float("inf"))):
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

    config = TheirConfig(
        num_heads=INNER // HEAD_DIM,
        head_dim=HEAD_DIM,
        hidden_size=WIDTH,
        state_size=STATE,
        expand=2,
        conv_kernel=KERNEL,
        n_groups=num_groups,
        use_bias=mixer.in_proj.bias is not None,
        use_conv_bias=mixer.conv.bias is not None,
        chunk_size=8,
        time_step_limit=dt_limit,
        rms_norm=True,
        layer_norm_epsilon=1e-5,
        num_hidden_layers=1,
    )
    theirs = TheirMixer(config, layer_idx=0)
    with torch.no_grad():
        theirs.in_proj.weight.copy_(mixer.in_proj.weight)
        theirs.conv1d.weight.copy_(mixer.conv.weight.unsqueeze(1))
        if mixer.conv.bias is not None:
            theirs.conv1d.bias.copy_(mixer.conv.bias)
        for layer, copy in ((mixer.in_proj, theirs.in_proj), (mixer.out_proj, theirs.out_proj)):
            if layer.bias is not None:
                copy.bias.copy_(layer.bias)
        theirs.norm.weight.copy_(mixer.norm.weight)
        theirs.out_proj.weight.copy_(mixer.out_proj.weight)
        for name in ("A_log", "D", "dt_bias"):
            getattr(theirs, name).copy_(getattr(mixer, name))
    return theirs


@pytest.mark.parametrize("length", [1, 8, 29])
def test_mixer_matches_transformers_forward_and_backward(length):
    compare_with_transformers(length)


@pytest.mark.parametrize(
    ("num_groups", "options"),
    [
        (1, {"proj_bias": True}),
        (1, {"conv_bias": False}),
        (3, {}),  # transformers normalises over as many groups as share B and C
        (1, {"dt_limit": (0.01, 0.03)}),
        (2, {"proj_bias": True, "conv_bias": False, "dt_limit": (0.0, 0.03), "norm_groups": 2}),
    ],
)
def test_options_match_transformers(num_groups, options):
    compare_with_transformers(13, num_groups, **options)


def compare_with_transformers(length, num_groups=1, **options):
    torch.manual_seed(0)
    mixer = make_mixer(num_groups, **options)
    limit = options.get("dt_limit", (0.0, float("inf")))
    theirs = transformers_mixer(mixer, num_groups, limit)
    if "dt_limit" in options:  # the limits are met from both sides
        step = torch.nn.functional.softplus(mixer.dt_bias)
        assert step.min() < max(limit[0], 0.006)
        assert step.max() > limit[1]
    x_LBD = torch.randn(length, 2, WIDTH, requires_grad=True)
    x_BLD = x_LBD.detach().transpose(0, 1).contiguous().requires_grad_()
    y_LBD, y_BLD = mixer(x_LBD, SequenceLayout(length, 2, CPU)), theirs(x_BLD)
    torch.testing.assert_close(y_LBD.transpose(0, 1), y_BLD, rtol=1e-4, atol=1e-5)

    weights = torch.randn_like(y_BLD)
    (y_LBD * weights.transpose(0, 1)).sum().backward()
    (y_BLD * weights).sum().backward()
    torch.testing.assert_close(x_LBD.grad.transpose(0, 1), x_BLD.grad, rtol=1e-3, atol=1e-4)
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in mixer.named_parameters():
        expected = theirs_by_name[name.replace("conv.", "conv1d.")].grad.view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_norm_groups_are_independent_of_the_groups_of_b_and_c():
    """The output norm by its formula, over 4 parts of the inner features, where all heads share B and C."""
    torch.manual_seed(0)
    mixer = make_mixer(norm_groups=4)
    kept = {}
    handle = mixer.norm.register_forward_hook(lambda module, inputs, output: kept.update(inputs=inputs, output=output))
    mixer(torch.randn(5, 2, WIDTH), SequenceLayout(5, 2, CPU))
    handle.remove()
    y, z = (t.double() for t in kept["inputs"])
    gated = y * z / (1 + torch.exp(-z))
    parts = gated.unflatten(-1, (4, INNER // 4))
    expected = (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * mixer.norm.weight.double()
    torch.testing.assert_close(kept["output"].double(), expected, rtol=1e-5, atol=1e-6)


def test_norm_and_maps_are_per_group():
    """Two groups equal two separate one-group mixers side by side."""
    torch.manual_seed(0)
    mixer = make_mixer(num_groups=2, dtype=torch.float64)
    x = torch.randn(13, 2, WIDTH, dtype=torch.float64)
    y = mixer(x, SequenceLayout(13, 2, CPU))
    maps, heads = STATE, INNER // HEAD_DIM // 2
    total = torch.zeros_like(y)
    for group in range(2):
        part = Mamba2Mixer(
            TorchLayers(),
            WIDTH,
            Mamba2Config(expand=1, head_dim=HEAD_DIM, state_dim=STATE, conv_kernel=KERNEL, chunk_size=8),
            norm_eps=1e-5,
        ).double()

        def rows(tensor, sizes, group=group):
            return torch.cat([t.chunk(2)[group] for t in tensor.split(sizes)])

        with torch.no_grad():
            convolved = [INNER, 2 * maps, 2 * maps]
            part.in_proj.weight.copy_(rows(mixer.in_proj.weight, [INNER, *convolved, 2 * heads]))
            part.conv.weight.copy_(rows(mixer.conv.weight, convolved))
            part.conv.bias.copy_(rows(mixer.conv.bias, convolved))
            for name in ("A_log", "D", "dt_bias"):
                getattr(part, name).copy_(getattr(mixer, name).chunk(2)[group])
            part.norm.weight.copy_(mixer.norm.weight.chunk(2)[group])
            part.out_proj.weight.copy_(mixer.out_proj.weight.chunk(2, dim=1)[group])
        total += part(x, SequenceLayout(13, 2, CPU))
    torch.testing.assert_close(y, total)


def test_documents_do_not_see_each_other():
    torch.manual_seed(0)
    mixer = make_mixer(dtype=torch.float64)
    x = torch.randn(11, 2, WIDTH, dtype=torch.float64)
    segments = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] + [-1]]).t()
    y = mixer(x, SequenceLayout(11, 2, CPU, segments))
    for row, start, stop in ((0, 0, 4), (0, 4, 11), (1, 0, 9), (1, 9, 10)):
        alone = mixer(x[start:stop, row : row + 1], SequenceLayout(stop - start, 1, CPU))
        torch.testing.assert_close(y[start:stop, row : row + 1], alone)


@pytest.mark.parametrize("prompt_length", [1, 2, 3, 12])
def test_step_continues_the_scan_with_constant_state(prompt_length):
    torch.manual_seed(0)
    mixer = make_mixer()
    x = torch.randn(20, 2, WIDTH)
    with torch.no_grad():
        expected = mixer(x, SequenceLayout(20, 2, CPU))
        cache = mixer.init_cache(2, torch.float32, CPU)
        pieces = [mixer(x[:prompt_length], SequenceLayout(prompt_length, 2, CPU), cache)]
        for i in range(prompt_length, 20):
            pieces.append(mixer(x[i : i + 1], SequenceLayout(1, 2, CPU, first_position=i), cache))
            assert cache.ssm_state_BHPN.shape == (2, INNER // HEAD_DIM, HEAD_DIM, STATE)
            assert cache.conv_state_KBC.shape[0] == KERNEL - 1
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"proj_bias": True, "conv_bias": False, "state_dim": 6, "groups": 2, "norm_groups": 4, "dt_limit": (0.0, 0.1)},
    ],
)
def test_cost_is_what_the_module_does(options, dtype):
    # Only the rounding of stated bytes / tokens is allowed for.
    check_cost(Mamba2Config(head_dim=8, chunk_size=16, **options), 32, dtype=dtype, activation_tolerance=1e-12)


def test_impossible_options_are_named_with_a_fix():
    ((field, found, rule, fix),) = Mamba2Config(head_dim=8, norm_groups=5).violations(32, 1)
    assert (field, found) == ("norm_groups", 5)
    assert "64" in rule
    assert "4 or 8" in fix
    for limit in ((0.2, 0.1), (-1.0, 1.0), (0.1, 0.1)):
        ((field, found, _, _),) = Mamba2Config(head_dim=8, dt_limit=limit).violations(32, 1)
        assert (field, found) == ("dt_limit", limit)
    config = Mamba2Config(head_dim=8, groups=4, norm_groups=1)
    ((field, found, rule, fix),) = config.parallel_violations(32, 2)
    assert (field, found) == ("norm_groups", 1)
    assert "normalised as a whole" in fix
