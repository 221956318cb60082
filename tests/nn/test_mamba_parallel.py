"""Mamba-1, and Mamba-2's options, over tensor-parallel ranks: outputs and gradients of the whole mixer."""

from __future__ import annotations

import pytest
import torch
from support.hybrid import changed, hybrid
from support.tensor_parallel import copy_shares, megatron_layers, parts_of, share, sum_replicated_gradients

from pretrain.parallel.layers import TorchLayers

MAMBA1 = hybrid("mm", 24, 32, mamba1__state_dim=3, mamba1__chunk_size=4, init_std=0.3)
MAMBA2 = hybrid("MM", 24, 32, mamba2__head_dim=6, mamba2__state_dim=4, mamba2__groups=2, mamba2__chunk_size=4,
                init_std=0.3)  # fmt: skip


def run(model, tokens_LB, seq_idx_LB):
    """Hidden states after the layers, before the final norm; gradients are left in the parameters."""
    kept = []
    handle = model.final_norm.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    model(tokens_LB, seq_idx_LB)
    handle.remove()
    weights = torch.sin(torch.arange(kept[0].numel(), dtype=torch.float64)).view_as(kept[0])
    return kept[0], weights


def compare_with_whole(rank, size, config, sequence_parallel):
    whole = config.build(TorchLayers())
    whole.reset_parameters(0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from constants, which would hide a wrong share
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    whole.double()
    model = config.build(megatron_layers(size, sequence_parallel)).double()
    copy_shares(whole, model, rank, size)
    tokens_LB = torch.randint(0, 32, (12, 2), generator=generator)
    seq_idx_LB = torch.tensor([[0] * 5 + [1] * 7, [0] * 12]).t()

    expected, weights = run(whole, tokens_LB, seq_idx_LB)
    found, _ = run(model, tokens_LB, seq_idx_LB)
    if sequence_parallel:
        expected_share, weights_share = expected.chunk(size)[rank], weights.chunk(size)[rank]
    else:
        expected_share, weights_share = expected, weights
    torch.testing.assert_close(found, expected_share, rtol=1e-11, atol=1e-11)
    (expected * weights).sum().backward()
    (found * weights_share).sum().backward()
    sum_replicated_gradients(model, sequence_parallel)
    split = set()
    for layer in ("0", "1"):
        theirs = parts_of(whole.layers[layer].mixer, gradients=True)
        ours = parts_of(model.layers[layer].mixer, gradients=True)
        assert ours.keys() == theirs.keys()
        for name, (part, gradient) in ours.items():
            wanted = share(part, theirs[name][1], rank, size)
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
            split |= {name} if part.shape != part.local_shape else set()
    return sorted(split)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("options", [{}, {"mamba1.proj_bias": True, "mamba1.conv_bias": False, "mamba1.dt_rank": 5}])
def test_mamba1_over_two_ranks_equals_the_whole(worker_pools, options, sequence_parallel):
    config = changed(MAMBA1, options)
    assert not list(config.parallel_violations(2, sequence_parallel, 12))
    for split in worker_pools(2, "megatron").run(compare_with_whole, config, sequence_parallel):
        names = {"A_log", "D", "dt_bias", "conv.weight", "dt_proj.weight", "out_proj.weight"}
        names |= {"x_proj.dt.weight", "x_proj.B.weight", "x_proj.C.weight"}
        names |= {"in_proj.x.weight", "in_proj.z.weight"}
        names |= {"in_proj.x.bias", "in_proj.z.bias"} if options else {"conv.bias"}
        assert set(split) == names


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        {"mamba2.norm_groups": 4, "mamba2.proj_bias": True},
        {"mamba2.conv_bias": False, "mamba2.dt_limit": (0.01, 0.05)},
    ],
)
def test_mamba2_options_over_two_ranks_equal_the_whole(worker_pools, options):
    config = changed(MAMBA2, options)
    assert not list(config.parallel_violations(2, True, 12))
    assert all(worker_pools(2, "megatron").run(compare_with_whole, config, True))
