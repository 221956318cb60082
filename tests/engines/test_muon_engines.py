"""Muon on every layout: the training of one process in plain torch, resumed and moved through canonical checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import engine_case, lm_case
from support.hybrid import hybrid
from support.lm_case import Case, differing, resume_and_save, state_of, train_and_save
from support.matrix import rotating

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig

pytestmark = pytest.mark.distributed

# The iteration multiplies small singular values by up to 500, and with them the rounding of gradients that were summed
# in another order: relative for losses (about 4) and gradient norms.
LOSS_TOLERANCE = 2e-5
NORM_TOLERANCE = 1e-3
NUM_STEPS = 6

LAYOUTS = {
    "zero0": Case(DeepSpeedConfig(zero_stage=0), 2, muon=True),
    "zero1": Case(DeepSpeedConfig(zero_stage=1), 2, muon=True),
    "zero2 offloaded": Case(DeepSpeedConfig(zero_stage=2, offload_optimizer=True), 2, muon=True),
    "zero3": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=100), 2, muon=True),
    "dp2": Case(MegatronConfig(distributed_optimizer=False), 2, muon=True),
    "dp2 distributed optimizer": Case(MegatronConfig(), 2, muon=True),
    "tp2 sp": Case(MegatronConfig(tensor_parallel=2, sequence_parallel=True), 2, muon=True),
    "pp2": Case(MegatronConfig(pipeline_parallel=2), 2, muon=True),
}


@pytest.fixture(scope="module")
def reference() -> lm_case.Reference:
    return lm_case.torch_reference(LAYOUTS["zero0"], NUM_STEPS)


ALWAYS = [("zero1",), ("tp2 sp",)]


@pytest.mark.parametrize("layout", [layout for (layout,) in rotating([(layout,) for layout in LAYOUTS], 4, ALWAYS)])
def test_trains_like_one_process(worker_pools: Any, tmp_path: Path, reference: lm_case.Reference, layout: str) -> None:
    case = LAYOUTS[layout]
    results = worker_pools(case.size, case.pool).run(train_and_save, case, tmp_path, NUM_STEPS)
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx(reference.losses, rel=LOSS_TOLERANCE)
        assert [norm for _, norm in rank] == pytest.approx(reference.norms, rel=NORM_TOLERANCE)
    state = state_of(tmp_path / f"step_{NUM_STEPS:08d}")
    for name, weight in reference.weights.items():
        torch.testing.assert_close(state[f"master:{name}"], weight, rtol=1e-2, atol=1e-3)
    moving = {key.partition(":")[2] for key in state if key.startswith("momentum_buffer:")}
    assert {"layers.0.mixer.in_proj.x.weight", "layers.0.mixer.out_proj.weight"} <= moving
    assert moving.isdisjoint(key.partition(":")[2] for key in state if key.startswith("exp_avg:"))
    assert "exp_avg:layers.0.mixer.conv.x.weight" in state


FAMILY = hybrid(
    "Mm*E",
    32,
    lm_case.VOCABULARY,
    attention__num_heads=4,
    attention__num_kv_heads=4,
    mamba2__head_dim=16,
    mamba2__state_dim=8,
    mamba2__groups=4,
    moe__num_experts=3,
)
RESUMED = {
    "zero2 family bf16": Case(DeepSpeedConfig(zero_stage=2), 2, muon=True, precision="bf16", model_config=FAMILY),
    "tp2 family bf16": Case(MegatronConfig(tensor_parallel=2), 2, muon=True, precision="bf16", model_config=FAMILY),
    "zero1 bf16": Case(DeepSpeedConfig(zero_stage=1), 2, muon=True, precision="bf16"),
    "zero3 offloaded bf16": Case(
        DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True, persistence_threshold=100),
        2,
        muon=True,
        precision="bf16",
    ),
    "dp2 bf16": Case(MegatronConfig(), 2, muon=True, precision="bf16"),
    "zero0": LAYOUTS["zero0"],
    "tp2 sp": LAYOUTS["tp2 sp"],
}


@pytest.mark.parametrize("layout", RESUMED)
def test_the_same_layout_resumes_bit_for_bit(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = RESUMED[layout]
    pool = worker_pools(case.size, case.pool)
    whole = pool.run(train_and_save, case, tmp_path / "whole", 4)
    pool.run(train_and_save, case, tmp_path / "part", 2)
    parts = pool.run(resume_and_save, case, tmp_path / "part/step_00000002", tmp_path / "resumed", 2, 4)
    assert parts == [rank[2:] for rank in whole]
    assert not differing(state_of(tmp_path / "part/step_00000002"), state_of(tmp_path / "resumed/step_00000000"))
    assert not differing(state_of(tmp_path / "whole/step_00000004"), state_of(tmp_path / "resumed/step_00000004"))


@pytest.mark.parametrize(("source", "target"), [("zero3", "tp2 sp"), ("tp2 sp", "zero1"), ("zero1", "zero0")])
def test_a_checkpoint_moves_between_layouts(
    worker_pools: Any, tmp_path: Path, reference: lm_case.Reference, source: str, target: str
) -> None:
    first, second = LAYOUTS[source], LAYOUTS[target]
    worker_pools(first.size, first.pool).run(train_and_save, first, tmp_path / "from", 3)
    path = tmp_path / "from/step_00000003"
    pool = worker_pools(second.size, second.pool)
    results = pool.run(resume_and_save, second, path, tmp_path / "to", 3, NUM_STEPS)
    assert CheckpointReader(path).training["optimizer_scalars"] == {"step": 3.0}
    assert not differing(state_of(path), state_of(tmp_path / "to/step_00000000"))
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx(reference.losses[3:], rel=LOSS_TOLERANCE)


def train_uneven(rank: int, size: int, case: engine_case.Case) -> list[tuple[float, float]]:
    return engine_case.run_steps(engine_case.build(case), rank, case, range(engine_case.NUM_STEPS))


@pytest.mark.parametrize(
    "case", [engine_case.Case(2, 2, muon=True), engine_case.Case(3, 4, muon=True, sub_group_size=64)]
)
def test_matrices_that_are_cut_and_padded_anywhere_train_like_plain_torch(
    worker_pools: Any, case: engine_case.Case
) -> None:
    found = engine_case.joined(worker_pools(case.size).run(train_uneven, case))
    expected = engine_case.torch_reference(muon=True)
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert found.norms == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
