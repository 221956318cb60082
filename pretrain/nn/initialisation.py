"""Parameter initialisation that depends on nothing but (seed, canonical name).

Every logical tensor is drawn whole on the CPU in fp32 from its own generator; the shard that is stored here is kept
and rounded to the parameter's dtype. So values are the same for any construction order, number of processes, layout,
device or packing, at the price of one whole tensor in host memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pretrain.ops.keyed_random import keyed_generator
from pretrain.parallel.canonical import canonical_parameters

Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills an fp32 CPU tensor in place."""


def normal(std: float) -> Initialiser:
    """Normal with mean 0."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def uniform(bound: float) -> Initialiser:
    """Uniform on [-bound, bound)."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill


def constant(value: float) -> Initialiser:
    """Every element ``value``."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


def log_uniform_decay(low: float, high: float) -> Initialiser:
    """Log of a uniform draw on [low, high): Mamba-2's A_log, so that A = -exp(A_log) is in (-high, -low]."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(low, high, generator=generator).log_()

    return fill


def log_count() -> Initialiser:
    """Log of 1, 2, 3, ... along the last dimension: Mamba-1's A_log."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.arange(1, tensor.shape[-1] + 1).log())

    return fill


def inverse_softplus_step(low: float, high: float, floor: float) -> Initialiser:
    """Bias whose softplus is log-uniform on [low, high), at least ``floor``: Mamba's dt_bias."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
        tensor.add_(tensor.neg().expm1().neg().log())

    return fill


@torch.no_grad()
def initialise(module: nn.Module, initialisers: Mapping[str, Initialiser], seed: int) -> None:
    """Fill every parameter of ``module``.

    Args:
        initialisers: one for each parameter name of ``module`` (a packed parameter's components share it,
            each with its own generator).
        seed: run seed.

    Raises:
        ValueError: if a parameter has no initialiser.
    """
    for parameter in canonical_parameters(module):
        name = parameter.module_name
        if name not in initialisers:
            raise ValueError(
                f"{name}: no initialiser, found ones for {sorted(initialisers)}; "
                "add the parameter to the initialisers of the layer that owns it"
            )
        for part in parameter.parts:
            values = torch.empty(part.shape, dtype=torch.float32)
            initialisers[name](values, keyed_generator(seed, "initialisation", part.name))
            shard = part.shard
            kept = values.view(shard.num_rows, shard.row_length)[:, shard.start : shard.stop]
            parameter.view(part).copy_(kept.reshape(part.local_shape))
