"""Accuracy and exact match of a model that is right often, on layouts, against counts by hand from one process.

The wanted tokens are those that the model finds likeliest, some of them replaced, so that answers of several lengths
are right, wrong, and right but for one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.lm_case import GLOBAL_BATCH, VOCABULARY, Case, build, rows_of, samples

from data_pipeline.source import SourcePart
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.layers import TorchLayers
from pretrain.training.evaluate import evaluate

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {
    "megatron tp2": (2, MegatronConfig(tensor_parallel=2)),
    "deepspeed dp2": (2, DeepSpeedConfig(zero_stage=1)),
}
COUNTS = {"first": 3, "second": 5}


class Rows:
    """Eight rows of two sources with these targets."""

    num_samples = GLOBAL_BATCH
    num_bytes = None
    parts = tuple(SourcePart(name, count) for name, count in COUNTS.items())

    def __init__(self, targets: np.ndarray) -> None:
        self._batch = samples(7) | {"targets": torch.from_numpy(targets)}

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: value.numpy()[list(indices)] for name, value in self._batch.items()}


def evaluated(rank: int, size: int, case: Case, targets: np.ndarray) -> dict[str, float] | None:
    objective = NextTokenConfig(accuracy=True, exact_match=True).build()
    return evaluate(build(case), objective, Rows(targets), batch_size=2)


@torch.no_grad()
def likeliest(case: Case) -> np.ndarray:
    """The model's tokens, int32 [rows, L], from plain torch row by row."""
    config = case.config()
    model = config.model.build(TorchLayers())
    model.reset_parameters(config.run.seed)
    rows = []
    for row in range(GLOBAL_BATCH):
        one = rows_of(samples(7), row, 1)
        logits = model(one["tokens"].t().long(), one["seq_idx"].t(), one["position_ids"].t())[:, 0]
        rows.append(logits.argmax(-1).int().numpy())
    return np.stack(rows)


def counted(right: np.ndarray, rows: Sequence[int]) -> tuple[float, float]:
    """Shares of right targets, and of those in answers (runs of targets in one document) that are wholly right."""
    batch = samples(7)
    mask, documents = batch["loss_mask"].numpy(), batch["seq_idx"].numpy()
    num_targets = num_right = num_exact = 0
    for row in rows:
        answers: list[list[bool]] = []
        for place in np.flatnonzero(mask[row]):
            follows = place > 0 and mask[row, place - 1] and documents[row, place - 1] == documents[row, place]
            if not follows:
                answers.append([])
            answers[-1].append(bool(right[row, place]))
        num_targets += sum(map(len, answers))
        num_right += sum(map(sum, answers))
        num_exact += sum(len(answer) for answer in answers if all(answer))
    return num_right / num_targets, num_exact / num_targets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracies_are_those_of_one_process(worker_pools: Any, layout: str) -> None:
    size, engine = LAYOUTS[layout]
    case = Case(engine, size, micro_batch=2)
    tokens = likeliest(case)
    right = np.random.default_rng(0).random(tokens.shape) > 0.25
    targets = np.where(right, tokens, (tokens + 1) % VOCABULARY).astype(np.int32)
    wanted = {}
    for prefix, rows in (
        ("validation_", range(8)),
        ("validation/first/", range(3)),
        ("validation/second/", range(3, 8)),
    ):
        accuracy, exact = counted(right, rows)
        assert 0.1 < exact < accuracy < 0.95
        wanted |= {f"{prefix}accuracy": accuracy, f"{prefix}exact_match": exact}
    for metrics in worker_pools(size, case.pool).run(evaluated, case, targets):
        found = {name: metrics[name] for name in wanted}
        assert found == pytest.approx(wanted, rel=1e-9)
