"""Learning-rate schedules against torch's schedulers; parameter groups."""

from __future__ import annotations

import pytest
import torch
from support.hybrid import hybrid
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from pretrain.config.schema import OptimizerConfig, ScheduleConfig
from pretrain.optim.build import build_optimizer
from pretrain.optim.schedule import learning_rate
from pretrain.parallel.layers import TorchLayers


@pytest.mark.parametrize(("kind", "warmup"), [("cosine", 0), ("cosine", 7), ("linear", 7), ("linear", 0)])
def test_follows_torchs_schedulers(kind: str, warmup: int) -> None:
    peak, horizon, ratio = 3e-3, 40, 0.1
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, horizon=horizon, final_ratio=ratio)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    decay_steps = horizon - 1 - warmup
    decay: torch.optim.lr_scheduler.LRScheduler
    if kind == "cosine":
        decay = CosineAnnealingLR(optimizer, T_max=decay_steps, eta_min=ratio * peak)
    else:
        decay = LinearLR(optimizer, start_factor=1.0, end_factor=ratio, total_iters=decay_steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler = decay
    if warmup:
        warm = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
        scheduler = SequentialLR(optimizer, [warm, decay], milestones=[warmup])
    for step in range(horizon):
        assert learning_rate(schedule, peak, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_stays_at_the_final_value_after_the_horizon() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, horizon=10, final_ratio=0.2)
    assert learning_rate(schedule, 1.0, 9) == pytest.approx(0.2)
    assert [learning_rate(schedule, 1.0, step) for step in (10, 500)] == pytest.approx([0.2, 0.2])
    constant = ScheduleConfig(kind="constant", warmup_steps=2, horizon=10)
    assert [learning_rate(constant, 1.0, step) for step in (0, 1, 50)] == [0.5, 1.0, 1.0]


def test_dynamics_norms_and_biases_are_not_decayed() -> None:
    """Mamba's authors exempt A_log, D and dt_bias; norms and biases are exempt as usual."""
    model = hybrid(
        pattern="M*-", width=32, vocab_size=16, attention__num_heads=2, mamba2__head_dim=16, mamba2__state_dim=8
    ).build(TorchLayers())
    decayed, exempt = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt_names = {name_of[id(parameter)] for parameter in exempt["params"]}
    for ending in ("A_log", "D", "dt_bias", "norm.weight", "conv.bias"):
        assert any(name.endswith(ending) for name in exempt_names)
    assert not any(name.endswith(("in_proj.weight", "out_proj.weight", "embedding.weight")) for name in exempt_names)
    assert len(decayed["params"]) + len(exempt["params"]) == len(name_of)
