"""Experts split over tensor-parallel ranks, with their losses, against the whole layer on one rank, in float64."""

import dataclasses

import pytest
import torch
from support.tensor_parallel import copy_shares, megatron_layers, parts_of, share, sum_replicated_gradients

from pretrain.nn.auxiliary import AuxiliaryLosses
from pretrain.nn.initialisation import initialise
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.moe import MoE
from pretrain.nn.moe_config import MoEConfig
from pretrain.parallel.layers import TorchLayers
from pretrain.parallel.process import all_reduce_floats, gather_objects

WIDTH, LENGTH, BATCH = 8, 10, 3
CONFIG = MoEConfig(
    num_experts=5, top_k=2, hidden_size=12, shared_hidden_size=6, routed_scale=1.5, balance_loss=0.3, z_loss=0.2
)
SIGMOID = dataclasses.replace(CONFIG, router="sigmoid", activation="relu2", shared_hidden_size=0, top_k=3)
# Padding lies wholly or partly on the second rank's share, or nowhere.
SEGMENTS = torch.tensor([[0] * 4 + [-1] * 6, [0] * 3 + [1] * 4 + [-1] * 3, [0] * 10]).t()


def step(module, x, dy, scale=0.7):
    """Output, gradient of the input, and the layer's numbers."""
    channel = AuxiliaryLosses([module], gather_objects)
    channel.set_scale(scale)
    x = x.clone().requires_grad_()
    y = module(x, SequenceLayout(LENGTH, BATCH, x.device, SEGMENTS))
    y.backward(dy)
    return y.detach(), x.grad, channel.report().values


def compare_with_whole(rank, size, config, sequence_parallel):
    generator = torch.Generator().manual_seed(4)
    x, dy = (torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    whole = MoE(TorchLayers(), WIDTH, config)
    initialise(whole, whole.initialisers(0.4, 0.4), seed=1)
    whole.double()
    module = MoE(megatron_layers(size, sequence_parallel), WIDTH, config).double()
    copy_shares(whole, module, rank, size)
    expected, dx, numbers = step(whole, x, dy)

    def local(tensor):
        return tensor.chunk(size)[rank] if sequence_parallel else tensor

    found = step(module, local(x), local(dy))
    torch.testing.assert_close(found[0], local(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], local(dx), rtol=1e-11, atol=1e-11)
    # The ranks' numbers add up to those of the whole, whose ranks all counted the same.
    assert all_reduce_floats(found[2]) == pytest.approx(numbers, rel=1e-11)
    sum_replicated_gradients(module, sequence_parallel)
    wanted = parts_of(whole, gradients=True)
    for name, (part, gradient) in parts_of(module, gradients=True).items():
        torch.testing.assert_close(gradient, share(part, wanted[name][1], rank, size), rtol=1e-11, atol=1e-11)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("config", [CONFIG, SIGMOID], ids=["softmax", "sigmoid"])
def test_two_ranks_equal_the_whole_layer(worker_pools, config, sequence_parallel):
    worker_pools(2, "megatron").run(compare_with_whole, config, sequence_parallel)
