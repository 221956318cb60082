"""Checkpoints between engines and layouts: bit-equal state after the move, the same training from there on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from support.lm_case import (
    Case,
    Reference,
    differing,
    resume_and_save,
    state_of,
    torch_reference,
    train_and_save,
)
from support.matrix import rotating

from pretrain.config.schema import DeepSpeedConfig, MegatronConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MOVED_AT, NUM_STEPS = 3, 6
# As in the engines' own tests: FP32 sums in another order.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-5

LAYOUTS = {
    "zero1 x 2": Case(DeepSpeedConfig(zero_stage=1), 2),
    "zero3 x 4": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=100), 4),
    "zero3 offloaded x 2": Case(
        DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True, persistence_threshold=100), 2
    ),
    "tp2 sp pp2": Case(MegatronConfig(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2), 4),
    "dp2 distributed optimizer": Case(MegatronConfig(), 2),
}
ALWAYS = [("zero3 x 4", "tp2 sp pp2"), ("tp2 sp pp2", "zero1 x 2")]


@cache
def reference() -> Reference:
    return torch_reference(LAYOUTS["zero1 x 2"], NUM_STEPS)


@pytest.fixture(scope="module")
def saved(worker_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint that a layout wrote after ``MOVED_AT`` steps, made on first use."""
    root = tmp_path_factory.mktemp("moves")

    @cache
    def checkpoint(layout: str) -> Path:
        case = LAYOUTS[layout]
        folder = root / layout.replace(" ", "_")
        worker_pools(case.size, case.pool).run(train_and_save, case, folder, MOVED_AT)
        return folder / f"step_{MOVED_AT:08d}"

    return checkpoint


@pytest.mark.parametrize(("source", "target"), rotating(list(permutations(LAYOUTS, 2)), 6, ALWAYS))
def test_a_checkpoint_moves_between_layouts(
    worker_pools: Any, tmp_path: Path, saved: Callable[[str], Path], source: str, target: str
) -> None:
    checkpoint, case = saved(source), LAYOUTS[target]
    results = worker_pools(case.size, case.pool).run(resume_and_save, case, checkpoint, tmp_path, MOVED_AT, NUM_STEPS)
    before, after = state_of(checkpoint), state_of(tmp_path / "step_00000000")
    assert {key.split(":")[0] for key in before} == {"master", "exp_avg", "exp_avg_sq"}
    assert differing(before, after) == []
    expected = reference()
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx(expected.losses[MOVED_AT:], rel=LOSS_TOLERANCE)
        assert [norm for _, norm in rank] == pytest.approx(expected.norms[MOVED_AT:], rel=NORM_TOLERANCE)
