"""Offloaded states of a few small weights, under plans written as letters."""

from dataclasses import replace

import torch

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.states import SLOTS, OffloadedStates

SIZES = (7, 5, 9, 4)
COUNT = 7
"""Subgroups of 4 elements that the weights are cut into."""


def new_values(step, target):
    return torch.randn(SIZES[target], generator=torch.Generator().manual_seed(31 * step + target))


def new_weights(device=None):
    values = [new_values(0, target).bfloat16() for target in range(len(SIZES))]
    return values if device is None else [device.model_tensor(value) for value in values]


def new_gradients(step, device=None):
    values = [new_values(step, target).bfloat16() for target in range(len(SIZES))]
    return values if device is None else [device.model_tensor(value) for value in values]


def new_states(device, plan, weights, **changes):
    config = OffloadConfig(enabled=True, subgroup_size=4, **changes)
    return OffloadedStates(weights, [0] * len(SIZES), config, gradient_dtype=torch.bfloat16, device=device, plan=plan)


def new_plan(places="SCSSRCC", **changes):
    """A plan of seven subgroups: C by the CPU, S streamed, R resident."""
    kinds = {"C": Place.CPU, "S": Place.STREAM, "R": Place.RESIDENT}
    made = tuple(kinds[letter] for letter in places)
    plan = Plan(
        made,
        device_order=tuple(i for i, place in enumerate(made) if place is not Place.CPU),
        cpu_order=tuple(i for i, place in enumerate(made) if place is Place.CPU),
        num_slots=2,
        num_host_buffers=2,
    )
    return replace(plan, **changes)


def content(states):
    return [states.read(target, slot) for target in range(len(SIZES)) for slot in SLOTS]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
