"""Optimizers from configuration."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pretrain.config.schema import MuonConfig, OptimizerChoice
from pretrain.optim.exchange import Share
from pretrain.optim.matrices import is_exempt, mark_embeddings, takes_muon
from pretrain.optim.muon import IS_MUON, MuonAdamW
from pretrain.parallel.canonical import CanonicalParameter, canonical_parameters
from pretrain.parallel.late_compiler import optimizers_without_compiler, step_without_compiler

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parameter_groups(model: nn.Module, config: OptimizerChoice) -> list[dict[str, Any]]:
    """Up to three groups of the trained parameters: matrices for Muon, decayed, exempt from weight decay."""
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in canonical_parameters(model):
        tensor = parameter.tensor
        if not tensor.requires_grad:
            continue
        if isinstance(config, MuonConfig) and takes_muon(tensor):
            muon.append(tensor)
        else:
            (exempt if is_exempt(tensor) else decayed).append(tensor)
    groups: list[dict[str, Any]] = [
        {"params": muon, "weight_decay": config.weight_decay, IS_MUON: True},
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerChoice) -> torch.optim.AdamW:
    """torch's own AdamW, whose state is a step count and two moments, so that a resumed run repeats it bit for bit; or
    Muon beside it, ready for whole parameters.

    (DeepSpeed's CPU Adam keeps running powers of beta that are recomputed on load and differ in the last bits.)
    """
    mark_embeddings(model)
    optimizer = optimizer_of(parameter_groups(model, config), config)
    if isinstance(optimizer, MuonAdamW):
        shares = [Share(p, 0, p.tensor.numel(), p.tensor, 0) for p in muon_parameters(model)]
        device = shares[0].key.device if shares else torch.device("cpu")
        optimizer.attach(shares, None, device)
    return optimizer


def optimizer_of(groups: Iterable[dict[str, Any]], config: OptimizerChoice) -> torch.optim.AdamW:
    """The optimizer that ``config`` names over parameter groups that have their own weight decay."""
    betas = (config.betas[0], config.betas[1])
    optimizers_without_compiler()
    if not isinstance(config, MuonConfig):
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps)
        # Of this object alone: DeepSpeed knows AdamW by its very class.
        step = torch.optim.Optimizer.profile_hook_step(step_without_compiler(torch.optim.AdamW))
        itself = weakref.ref(optimizer)  # no circle: its state goes when it goes

        def own_step(*args: Any, **kwargs: Any) -> Any:
            return step(itself(), *args, **kwargs)

        own_step.__func__ = step  # type: ignore[attr-defined]  # as a method has it: torch's LRScheduler wraps that
        optimizer.step = own_step  # type: ignore[method-assign]
        return optimizer
    return MuonAdamW(
        groups,
        lr=config.learning_rate,
        betas=betas,
        eps=config.eps,
        momentum=config.momentum,
        newton_schulz_steps=config.newton_schulz_steps,
        newton_schulz_dtype=_DTYPES[config.newton_schulz_precision],
    )


def muon_parameters(model: nn.Module) -> list[CanonicalParameter]:
    """The trained parameters of ``model`` that Muon takes."""
    return [p for p in canonical_parameters(model) if p.tensor.requires_grad and takes_muon(p.tensor)]
