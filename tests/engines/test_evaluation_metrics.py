"""Validation by source with accuracies, on layouts of both engines, against plain torch row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.lm_case import GLOBAL_BATCH, Case, build, rows_of, samples
from torch.nn.functional import cross_entropy

from data_pipeline.source import SourcePart
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.layers import TorchLayers
from pretrain.training.evaluate import evaluate

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {
    "deepspeed zero3": (2, DeepSpeedConfig(zero_stage=3)),
    "megatron dp2 tp2": (4, MegatronConfig(tensor_parallel=2)),
    "megatron pp2 interleaved": (2, MegatronConfig(pipeline_parallel=2, virtual_pipeline=2)),
}
NUM_SAMPLES = GLOBAL_BATCH
COUNTS = {"small": 1, "large": 7}
NUM_BYTES = {"small": 50, "large": 600}


class Rows:
    """Eight rows, the first of one source, the others of another."""

    num_samples = NUM_SAMPLES
    num_bytes = sum(NUM_BYTES.values())
    parts = tuple(SourcePart(name, COUNTS[name], NUM_BYTES[name]) for name in COUNTS)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: value.numpy()[list(indices)] for name, value in samples(7).items()}


def objective() -> Any:
    return NextTokenConfig(accuracy=True, exact_match=True, z_loss=1e-4).build()


def trained_and_evaluated(rank: int, size: int, case: Case) -> tuple[dict[str, float] | None, list[str]]:
    engine = build(case)
    metrics = evaluate(engine, objective(), Rows(), batch_size=2)
    # Training afterwards reports its own names, which are others.
    batch = samples(0)
    starts = range(case.micro_batch * engine.dp_rank, GLOBAL_BATCH, case.micro_batch * engine.dp_size)
    micro = [rows_of(batch, start, case.micro_batch) for start in starts]
    result = engine.train_step(micro, objective(), float(batch["loss_mask"].sum()), 0.0)
    return metrics, sorted(result.metrics)


@torch.no_grad()
def expected(case: Case) -> dict[str, float]:
    config = case.config()
    model = config.model.build(TorchLayers())
    model.reset_parameters(config.run.seed)
    sums = {name: np.zeros(4) for name in ("small", "large")}
    for row in range(NUM_SAMPLES):
        one = rows_of(samples(7), row, 1)
        logits = model(one["tokens"].t().long(), one["seq_idx"].t(), one["position_ids"].t())[:, 0]
        mask, targets = one["loss_mask"][0], one["targets"][0].long()
        loss = float(cross_entropy(logits[mask].double(), targets[mask], reduction="sum"))
        right = (logits.argmax(-1) == targets) & mask
        answers, place = 0, 0
        while place < len(mask):
            end = place + 1
            if mask[place]:
                document = one["seq_idx"][0]
                while end < len(mask) and mask[end] and document[end] == document[place]:
                    end += 1
                answers += (end - place) * int(right[place:end].all())
            place = end
        sums["small" if row < COUNTS["small"] else "large"] += [loss, float(mask.sum()), float(right.sum()), answers]
    figures: dict[str, float] = {}
    for prefix, (loss, count, right, answers), num_bytes in [
        ("validation_", sums["small"] + sums["large"], sum(NUM_BYTES.values())),
        *((f"validation/{name}/", sums[name], NUM_BYTES[name]) for name in sums),
    ]:
        figures |= {
            f"{prefix}loss": loss / count,
            f"{prefix}perplexity": math.exp(loss / count),
            f"{prefix}bits_per_byte": loss / math.log(2) / num_bytes,
            f"{prefix}accuracy": right / count,
            f"{prefix}exact_match": answers / count,
        }
    return figures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_each_source_are_the_same_on_every_layout(worker_pools: Any, layout: str) -> None:
    size, engine = LAYOUTS[layout]
    case = Case(engine, size, micro_batch=2)
    wanted = expected(case)
    assert wanted["validation_accuracy"] > 0
    for metrics, names in worker_pools(size, case.pool).run(trained_and_evaluated, case):
        assert metrics == pytest.approx(wanted, rel=2e-5)
        assert names == ["accuracy", "cross_entropy", "exact_match", "z_loss"]
