"""Beginning with given weights on any engine and layout: masters are these values, the optimizer begins anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_case import GLOBAL_BATCH, Case, build, rate, rows_of, run_steps, samples, save, state_of, train_and_save
from torch import nn

from pretrain.checkpoint.locate import checkpoint_folder
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.optim.build import build_optimizer
from pretrain.parallel.layers import TorchLayers
from pretrain.training.initial_weights import WeightsOnly, initial_weights_digest

NUM_STEPS = 3
# As in the engines' own tests: FP32 sums in another order.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5
SOURCE = Case(DeepSpeedConfig(zero_stage=1), 1)
LAYOUTS = {
    "zero0 x 1": Case(DeepSpeedConfig(zero_stage=0), 1),
    "zero2 x 2, bf16": Case(DeepSpeedConfig(zero_stage=2), 2, precision="bf16"),
    "zero3 x 2": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=100), 2),
    "tp2 pp2": Case(MegatronConfig(tensor_parallel=2, pipeline_parallel=2), 4),
    "dp2, bf16": Case(MegatronConfig(), 2, precision="bf16"),
    "muon": Case(DeepSpeedConfig(zero_stage=1), 1, muon=True),
}


def begin(rank: int, size: int, case: Case, checkpoint: Path, root: Path) -> list[tuple[float, float]]:
    """Take over weights in a fresh engine, save them at once, train."""
    engine = build(case)
    engine.import_state(WeightsOnly(checkpoint, engine.scalar_state()))
    save(engine, root, 0, rank)
    return run_steps(engine, case, range(NUM_STEPS))


@pytest.fixture(scope="module")
def trained(worker_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run, moments and all."""
    folder = tmp_path_factory.mktemp("source")
    worker_pools(1, SOURCE.pool).run(train_and_save, SOURCE, folder, 4)
    return checkpoint_folder(folder / "step_00000004")


@pytest.fixture(scope="module")
def reference(trained: Path) -> Callable[[], list[tuple[float, float]]]:
    """Plain torch from the same weights: mean losses and gradient norms."""

    @cache
    def train() -> list[tuple[float, float]]:
        config = SOURCE.config()
        model = config.model.build(TorchLayers())
        load_weights(model, CheckpointReader(trained))
        optimizer, objective, results = build_optimizer(model, config.optimizer), NextTokenConfig().build(), []
        for step in range(NUM_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            batch, total = samples(step), 0.0
            targets = float(batch["loss_mask"].sum())
            for start in range(0, GLOBAL_BATCH, 2):
                loss = objective(model, rows_of(batch, start, 2)).loss_sum
                (loss / targets).backward()
                total += float(loss.detach())
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), SOURCE.clip or float("inf")))
            optimizer.step()
            results.append((total / targets, norm))
        return results

    return train


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_begins_with_the_weights_and_no_moments(
    worker_pools: Any,
    tmp_path: Path,
    trained: Path,
    reference: Callable[[], list[tuple[float, float]]],
    layout: str,
) -> None:
    case = LAYOUTS[layout]
    ranks = worker_pools(case.size, case.pool).run(begin, case, trained, tmp_path)
    source, start = state_of(trained), state_of(tmp_path / "step_00000000")
    weights = {name for name in source if name.startswith("master:")}
    assert any(tensor.any() for name, tensor in source.items() if name.startswith("exp_avg:"))
    assert weights <= start.keys()
    assert [name for name in weights if not torch.equal(source[name], start[name])] == []
    assert [name for name in start.keys() - weights if start[name].any()] == []
    if case.precision == "bf16" or case.muon:
        # The first loss tells the weights; bf16 rounds and Muon steps differently.
        assert ranks[0][0][0] == pytest.approx(reference()[0][0], rel=1e-2)
        return
    for rank in ranks:
        assert [loss for loss, _ in rank] == pytest.approx([loss for loss, _ in reference()], rel=LOSS_TOLERANCE)
        assert [norm for _, norm in rank] == pytest.approx([norm for _, norm in reference()], rel=NORM_TOLERANCE)


def test_the_digest_is_of_the_content(trained: Path, tmp_path: Path) -> None:
    digest = initial_weights_digest(trained)
    twin = tmp_path / "step_00000004"
    twin.mkdir()
    for path in trained.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    assert initial_weights_digest(twin) == digest
    text = (twin / "manifest.json").read_text()
    (twin / "manifest.json").write_text(text.replace('"step": 4', '"step": 5', 1))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        initial_weights_digest(twin)


@pytest.mark.parametrize(
    ("made", "hint"),
    [(None, "no such folder"), ("checkpoints", "it is a run directory"), ("config.json", "pretrain import")],
)
def test_what_is_no_checkpoint_is_told(tmp_path: Path, made: str | None, hint: str) -> None:
    folder = tmp_path / "folder"
    if made is not None:
        (folder / made).mkdir(parents=True)
        if made.endswith("json"):
            (folder / made).rmdir()
            (folder / made).write_text("{}")
    with pytest.raises(CheckpointError, match=hint):
        checkpoint_folder(folder)


def test_weights_only_leaves_the_reader_as_it_is(trained: Path) -> None:
    plain, weights = CheckpointReader(trained), WeightsOnly(trained, {"step": 0.0})
    assert weights.training == {"optimizer_scalars": {"step": 0.0}}
    assert plain.training["optimizer_scalars"]["step"] == 4.0
    assert weights.names("master") == plain.names("master")
