"""Mixtures of experts on every engine and layout: the objective's loss plus the written-out losses of the router."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hybrid import changed, hybrid
from support.lm_case import (
    GLOBAL_BATCH,
    VOCABULARY,
    Case,
    build,
    differing,
    rate,
    resume_and_save,
    rows_of,
    samples,
    save,
    state_of,
)
from support.logical import logical_tensors
from torch import nn

from pretrain.config.schema import DeepSpeedConfig, MegatronConfig
from pretrain.nn.moe import MoE
from pretrain.objectives.config import NextTokenConfig
from pretrain.optim.build import build_optimizer
from pretrain.parallel.layers import TorchLayers
from pretrain.parallel.process import all_reduce_floats

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 4
# FP32 sums in another order, relative.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5

MODEL = hybrid(
    pattern="E*-E",
    width=16,
    vocab_size=VOCABULARY,
    attention__num_heads=2,
    attention__num_kv_heads=2,
    mlp__ratio=2.0,
    moe__num_experts=4,
    moe__hidden_size=12,
    moe__shared_hidden_size=8,
    moe__balance_loss=0.5,
    moe__z_loss=0.1,
    init_std=0.3,
)
LAYOUTS: dict[str, tuple[int, Any]] = {
    "one process": (1, DeepSpeedConfig(zero_stage=0)),
    "zero 0": (2, DeepSpeedConfig(zero_stage=0)),
    "zero 1": (2, DeepSpeedConfig(zero_stage=1)),
    "zero 2": (2, DeepSpeedConfig(zero_stage=2)),
    "zero 3": (2, DeepSpeedConfig(zero_stage=3, persistence_threshold=20)),
    "megatron dp2": (2, MegatronConfig()),
    "megatron tp2": (2, MegatronConfig(tensor_parallel=2)),
    "megatron tp2 sp": (2, MegatronConfig(tensor_parallel=2, sequence_parallel=True)),
    "megatron pp2": (2, MegatronConfig(pipeline_parallel=2)),
    "megatron pp2 interleaved": (2, MegatronConfig(pipeline_parallel=2, virtual_pipeline=2)),
}


def case_of(layout: str, **changes: Any) -> Case:
    size, engine = LAYOUTS[layout]
    parallel = engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, MegatronConfig) else 1
    micro_batch = 4 if size == parallel else 2
    return Case(engine, size, micro_batch=micro_batch, model_config=changes.pop("model", MODEL), **changes)


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def router_losses(logits_LBE: torch.Tensor, real_LB: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """(balance loss, z-loss) as sums over tokens, row by row, and the tokens sent to each expert."""
    num_experts = logits_LBE.shape[-1]
    balance, sent = torch.zeros(()), torch.zeros(num_experts)
    for b in range(logits_LBE.shape[1]):
        logits = logits_LBE[real_LB[:, b], b]
        scores = logits.softmax(-1)
        counts = torch.nn.functional.one_hot(scores.topk(top_k)[1], num_experts).sum((0, 1)).float()
        fractions = num_experts * counts / (top_k * len(logits))
        balance = balance + len(logits) * (fractions * scores.mean(0)).sum()
        sent += counts
    return balance, (logits_LBE[real_LB].exp().sum(-1).log() ** 2).sum(), sent


@cache
def reference() -> Trajectory:
    """One plain loop: autograd of the whole loss, whose parts are computed from what the routers were given."""
    config = case_of("one process").config()
    model = config.model.build(TorchLayers())
    model.reset_parameters(config.run.seed)
    optimizer = build_optimizer(model, config.optimizer)
    objective = NextTokenConfig().build()
    given: list[torch.Tensor] = []
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    for router in routers:
        router.register_forward_hook(lambda module, inputs, output: given.append(inputs[0] @ module.weight.t()))
    losses, norms, metrics = [], [], []
    moe = MODEL.moe
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        given.clear()
        batch = samples(step)
        targets = float(batch["loss_mask"].sum())
        real_LB = batch["seq_idx"].t() >= 0
        loss = objective(model, batch).loss_sum
        parts = [router_losses(logits, real_LB, moe.top_k) for logits in given]
        added = [moe.balance_loss * balance + moe.z_loss * z for balance, z, _ in parts]
        ((loss + torch.stack(added).sum()) / targets).backward()
        tokens = float(real_LB.sum())
        metrics.append(
            {
                "router_balance_loss": sum(float(b.detach()) for b, _, _ in parts) / tokens / len(parts),
                "router_z_loss": sum(float(z.detach()) for _, z, _ in parts) / tokens / len(parts),
                "busiest_expert": sum(float(sent.max() / sent.mean()) for _, _, sent in parts) / len(parts),
            }
        )
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()) / targets)
    return Trajectory(losses, norms, metrics, {n: v.clone() for n, v in logical_tensors(model).items()})


Steps = list[tuple[float, float, dict[str, float]]]


def train(rank: int, size: int, case: Case, root: Path | None, num_steps: int = NUM_STEPS) -> Steps:
    """(mean loss, gradient norm, metrics of the layers) of each step."""
    engine = build(case)
    objective = NextTokenConfig().build()
    results = []
    for step in range(num_steps):
        batch = samples(step)
        targets = float(batch["loss_mask"].sum())
        starts = range(case.micro_batch * engine.dp_rank, GLOBAL_BATCH, case.micro_batch * engine.dp_size)
        micro = [rows_of(batch, start, case.micro_batch) for start in starts]
        result = engine.train_step(micro, objective, targets, rate(step))
        sums = all_reduce_floats([result.loss_sum, *result.layers.values])
        results.append((sums[0] / targets, result.grad_norm, result.layers.metrics(sums[1:])))
        # Evaluation in between adds nothing to the report.
        engine.eval_step(rows_of(batch, 0, 2), objective)
    if root is not None:
        save(engine, root, num_steps, rank)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_like_plain_torch_with_the_losses_written_out(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = case_of(layout)
    results = worker_pools(case.size, case.pool).run(train, case, tmp_path)
    expected = reference()
    for rank in results:
        assert [loss for loss, _, _ in rank] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert [norm for _, norm, _ in rank] == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
        for (_, _, metrics), wanted in zip(rank, expected.metrics, strict=True):
            assert metrics == pytest.approx(wanted, rel=1e-5)
    state = state_of(tmp_path / f"step_{NUM_STEPS:08d}")
    slot = "master" if isinstance(case.engine, MegatronConfig) else "weight"
    kind = slot if f"{slot}:final_norm.weight" in state else "master"
    for name, weight in expected.weights.items():
        torch.testing.assert_close(state[f"{kind}:{name}"], weight, rtol=1e-3, atol=2e-5)


def test_the_losses_reach_the_gradient() -> None:
    """The comparison above would not notice losses that do nothing in either."""
    config = changed(MODEL, {"moe.balance_loss": 0.0, "moe.z_loss": 0.0})
    model = config.build(TorchLayers())
    model.reset_parameters(5)
    batch = samples(0)
    loss = NextTokenConfig().build()(model, batch).loss_sum / batch["loss_mask"].sum()
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    assert norm != pytest.approx(reference().norms[0], rel=0.01)


@pytest.mark.parametrize("layout", ["zero 1", "megatron tp2 sp", "megatron pp2"])
def test_activation_checkpointing_changes_no_bit(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    found = []
    for name, policy in (("kept", "none"), ("recomputed", "layers")):
        case = replace(case_of(layout), activation_checkpointing=policy)
        found.append(worker_pools(case.size, case.pool).run(train, case, tmp_path / name, 2))
    assert found[0] == found[1]
    assert not differing(state_of(tmp_path / "kept/step_00000002"), state_of(tmp_path / "recomputed/step_00000002"))


@pytest.mark.parametrize("layout", ["zero 1", "megatron tp2 sp"])
def test_bf16_stays_close_to_fp32(worker_pools: Any, layout: str) -> None:
    case = case_of(layout, precision="bf16")
    expected = reference()
    for rank in worker_pools(case.size, case.pool).run(train, case, None, 2):
        for (loss, norm, metrics), wanted in zip(rank, range(2), strict=True):
            assert loss == pytest.approx(expected.losses[wanted], rel=0.02)
            assert norm == pytest.approx(expected.norms[wanted], rel=0.05)
            assert metrics == pytest.approx(expected.metrics[wanted], rel=0.02)


def test_checkpoints_move_between_layouts(worker_pools: Any, tmp_path: Path) -> None:
    """Experts split over two tensor-parallel ranks are the whole experts that ZeRO and a pipeline take over."""
    first = case_of("megatron tp2 sp")
    worker_pools(2, "megatron").run(train, first, tmp_path, 2)
    saved = tmp_path / "step_00000002"
    state = state_of(saved)
    assert tuple(state["master:layers.0.mixer.gate.weight"].shape) == (4, 12, 16)
    assert tuple(state["master:layers.3.mixer.down.weight"].shape) == (4, 16, 12)
    for layout in ("zero 3", "megatron pp2", "megatron tp2"):
        case = case_of(layout)
        results = worker_pools(case.size, case.pool).run(resume_and_save, case, saved, tmp_path / layout, 2, NUM_STEPS)
        assert not differing(state, state_of(tmp_path / layout / "step_00000000"))
        for rank in results:
            assert [loss for loss, _ in rank] == pytest.approx(reference().losses[2:], rel=LOSS_TOLERANCE)
            assert [norm for _, norm in rank] == pytest.approx(reference().norms[2:], rel=NORM_TOLERANCE)
