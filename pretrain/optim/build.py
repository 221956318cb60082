"""Optimizers from configuration."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config.schema import OptimizerConfig
from pretrain.parallel.canonical import canonical_parameters


def is_exempt(parameter: torch.Tensor) -> bool:
    """Whether weight decay leaves the parameter alone: marked so, or fewer than two dimensions."""
    return getattr(parameter, "no_weight_decay", False) or parameter.ndim < 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: decayed, and exempt (``param.no_weight_decay``, or fewer than two dimensions)."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in canonical_parameters(model):
        tensor = parameter.tensor
        if not tensor.requires_grad:
            continue
        (exempt if is_exempt(tensor) else decayed).append(tensor)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own AdamW: its state is a step count and two moments, so a resumed run repeats it bit for bit.

    (DeepSpeed's CPU Adam keeps running powers of beta that are recomputed on load and differ in the last bits.)
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
    )
