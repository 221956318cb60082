"""The language models with ZeRO: the same training as plain torch at every stage, offload and number of ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_case import (
    PATTERNS,
    Case,
    Reference,
    rows_of,
    run_steps,
    samples,
    state_of,
    torch_reference,
    train_and_save,
)
from support.lm_case import build as build_engine
from support.matrix import pairwise

from pretrain.config.schema import DeepSpeedConfig
from pretrain.objectives.config import NextTokenConfig

pytestmark = pytest.mark.distributed

NUM_STEPS = 20
# FP32 sums in another order: relative for losses (about 4), and for gradient norms.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5

OFFLOADS = {
    "none": {},
    "optimizer": {"offload_optimizer": True},
    "parameters": {"offload_parameters": True},
    "both": {"offload_optimizer": True, "offload_parameters": True},
}
POSSIBLE_OFFLOADS = {0: ["none"], 1: ["none", "optimizer"], 2: ["none", "optimizer"], 3: list(OFFLOADS)}
MATRIX = [
    (stage, offload, size, model)
    for stage, offloads in POSSIBLE_OFFLOADS.items()
    for offload in offloads
    for size in (1, 2, 4)
    for model in PATTERNS
]


def engine_of(stage: int, offload: str = "none", **settings: Any) -> DeepSpeedConfig:
    """Buckets hold the largest parameter and little more. At stage 3 parameters of up to 100 elements stay whole; all
    others are gathered layer by layer."""
    if stage:
        settings["reduce_bucket_size"] = 5000
    if stage == 3:
        settings["persistence_threshold"] = 100
    return DeepSpeedConfig(zero_stage=stage, **OFFLOADS[offload], **settings)


@cache
def reference(model: str) -> Reference:
    return torch_reference(Case(engine_of(0), 1, model), NUM_STEPS)


@pytest.mark.parametrize(("stage", "offload", "size", "model"), pairwise(MATRIX))
def test_language_models_train_like_plain_torch(
    worker_pools: Any, tmp_path: Path, stage: int, offload: str, size: int, model: str
) -> None:
    # Every rank has two micro-batches a step.
    case = Case(engine_of(stage, offload), size, model, micro_batch=4 // size)
    results = worker_pools(size).run(train_and_save, case, tmp_path, NUM_STEPS)
    expected = reference(model)
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert [norm for _, norm in rank] == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
    state = state_of(tmp_path / f"step_{NUM_STEPS:08d}")
    assert {f"master:{name}" for name in expected.weights} == {key for key in state if key.startswith("master:")}
    for name, weight in expected.weights.items():
        torch.testing.assert_close(state[f"master:{name}"], weight, rtol=1e-3, atol=2e-5)


# What the matrix leaves out: layers computed again, an untied head, the z-loss, communication under the backward pass.
VARIANTS = {
    "layers computed again": Case(engine_of(3, "both"), 2, activation_checkpointing="layers"),
    "untied": Case(engine_of(3, "both"), 2, tied=False, z_loss=1e-3),
    "overlap": Case(engine_of(2, overlap_comm=True), 2, activation_checkpointing="layers"),
}


def train_and_evaluate(rank: int, size: int, case: Case) -> tuple[list[tuple[float, float]], float]:
    engine = build_engine(case)
    results = run_steps(engine, case, range(5))
    return results, engine.eval_step(rows_of(samples(99), 0, 2), NextTokenConfig().build()).loss_sum


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_evaluate_like_plain_torch(worker_pools: Any, variant: str) -> None:
    expected = torch_reference(VARIANTS[variant], 5)
    for results, evaluated in worker_pools(2).run(train_and_evaluate, VARIANTS[variant]):
        assert [loss for loss, _ in results] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert [norm for _, norm in results] == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
        assert evaluated == pytest.approx(expected.evaluation, rel=2e-6)
