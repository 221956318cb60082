"""The language models with ZeRO: packed documents, tied and untied embeddings, layers computed again."""

from __future__ import annotations

from typing import Any

import pytest
from support.lm_case import PATTERNS, Case, rows_of, run_steps, samples, torch_reference
from support.lm_case import build as build_engine

from pretrain.config.schema import DeepSpeedConfig
from pretrain.objectives.config import NextTokenConfig

pytestmark = pytest.mark.distributed

NUM_STEPS = 5
# Parameters of up to 100 elements stay whole; all others are gathered layer by layer.
ZERO_3 = DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True, persistence_threshold=100)
CASES = [
    *(Case(ZERO_3, 2, model=model, activation_checkpointing="layers") for model in PATTERNS),
    Case(ZERO_3, 2, tied=False, z_loss=1e-3),
    Case(DeepSpeedConfig(zero_stage=2, overlap_comm=True), 2, activation_checkpointing="layers"),
]


def train_and_evaluate(rank: int, size: int, case: Case) -> tuple[list[tuple[float, float]], float]:
    engine = build_engine(case)
    results = run_steps(engine, case, range(NUM_STEPS))
    return results, engine.eval_step(rows_of(samples(99), 0, 2), NextTokenConfig().build())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-zero{case.engine.zero_stage}-{case.tied}")
def test_language_models_train_like_plain_torch(worker_pools: Any, case: Case) -> None:
    reference = torch_reference(case, NUM_STEPS)
    for results, evaluated in worker_pools(2).run(train_and_evaluate, case):
        assert [loss for loss, _ in results] == pytest.approx(reference.losses, rel=2e-6)
        assert [norm for _, norm in results] == pytest.approx(reference.norms, rel=2e-5)
        assert evaluated == pytest.approx(reference.evaluation, rel=2e-6)
