"""Checkpoints of the Megatron-Core engine with offloaded optimizer state know nothing of places and plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.lm_case import (
    Case,
    build,
    differing,
    resume_and_save,
    run_steps,
    save,
    state_of,
    train_and_save,
)
from support.matrix import rotating
from support.offload_lm_case import OffloadCase

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig, OffloadConfig
from pretrain.optim.offload.choose import even_plan

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MOVED_AT, NUM_STEPS = 2, 4
CPU = OffloadConfig(enabled=True, fraction=0.0, subgroup_size=400)
MIXED = OffloadConfig(enabled=True, fraction=0.5, resident_fraction=0.3, subgroup_size=130)
LOW_BITS = OffloadConfig(enabled=True, fraction=0.7, subgroup_size=900, master="low_bits")
LOW_BITS_RESIDENT = OffloadConfig(enabled=True, resident_fraction=1.0, master="low_bits", overlap=False)


def on(size: int, offload: OffloadConfig, engine: Any = None, **changes: Any) -> OffloadCase:
    return OffloadCase(engine or MegatronConfig(), size, offload=offload, **changes)


PLANS = [(CPU, MIXED), (MIXED, LOW_BITS), (LOW_BITS, CPU), (LOW_BITS, LOW_BITS_RESIDENT), (LOW_BITS_RESIDENT, MIXED)]


@pytest.mark.parametrize(("first", "second"), rotating(PLANS, 3, [(MIXED, LOW_BITS), (LOW_BITS, CPU)]))
def test_a_run_goes_on_bit_for_bit_under_another_plan(
    worker_pools: Any, tmp_path: Path, first: OffloadConfig, second: OffloadConfig
) -> None:
    case = on(2, first, precision="bf16")
    pool = worker_pools(2, case.pool)
    whole = pool.run(train_and_save, case, tmp_path / "whole", NUM_STEPS)
    pool.run(train_and_save, case, tmp_path / "part", MOVED_AT)
    resumed = replace(case, offload=second)
    checkpoint = tmp_path / f"part/step_{MOVED_AT:08d}"
    parts = pool.run(resume_and_save, resumed, checkpoint, tmp_path / "resumed", MOVED_AT, NUM_STEPS)
    assert parts == [rank[MOVED_AT:] for rank in whole]
    assert not differing(state_of(checkpoint), state_of(tmp_path / "resumed/step_00000000"))
    last = f"step_{NUM_STEPS:08d}"
    assert not differing(state_of(tmp_path / "whole" / last), state_of(tmp_path / "resumed" / last))


PLACES: dict[str, Case] = {
    "dp2": on(2, OffloadConfig()),
    "dp2 offloaded": on(2, MIXED),
    "dp2 tp2 sp offloaded": on(4, CPU, MegatronConfig(tensor_parallel=2, sequence_parallel=True)),
    "pp2 interleaved offloaded": on(2, MIXED, MegatronConfig(pipeline_parallel=2, virtual_pipeline=2)),
    "zero3 x 2": on(2, OffloadConfig(), DeepSpeedConfig(zero_stage=3, persistence_threshold=100)),
    "zero2 x 2 offloaded": on(2, MIXED, DeepSpeedConfig(zero_stage=2)),
}
MOVES = [
    ("dp2", "dp2 offloaded"),
    ("dp2 offloaded", "dp2"),
    ("dp2 offloaded", "dp2 tp2 sp offloaded"),
    ("dp2 offloaded", "zero3 x 2"),
    ("dp2 tp2 sp offloaded", "pp2 interleaved offloaded"),
    ("dp2 tp2 sp offloaded", "zero2 x 2 offloaded"),
    ("pp2 interleaved offloaded", "dp2"),
    ("zero3 x 2", "pp2 interleaved offloaded"),
    ("zero2 x 2 offloaded", "dp2 tp2 sp offloaded"),
]
MUST_MOVE = [("dp2", "dp2 offloaded"), ("dp2 tp2 sp offloaded", "pp2 interleaved offloaded")]


@pytest.fixture(scope="module")
def trained(worker_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Any, Path]]:
    """Results and checkpoint of one of the places after some steps, made on first use."""

    @cache
    def run(place: str, num_steps: int) -> tuple[Any, Path]:
        case, root = PLACES[place], tmp_path_factory.mktemp("places")
        results = worker_pools(case.size, case.pool).run(train_and_save, case, root, num_steps)
        return results, root / f"step_{num_steps:08d}"

    return run


@pytest.mark.parametrize(("source", "target"), rotating(MOVES, 3, MUST_MOVE))
def test_a_checkpoint_moves_between_places(
    worker_pools: Any, tmp_path: Path, trained: Callable[..., tuple[Any, Path]], source: str, target: str
) -> None:
    case = PLACES[target]
    _, checkpoint = trained(source, MOVED_AT)
    expected, _ = trained("dp2", NUM_STEPS)
    results = worker_pools(case.size, case.pool).run(resume_and_save, case, checkpoint, tmp_path, MOVED_AT, NUM_STEPS)
    before, after = state_of(checkpoint), state_of(tmp_path / "step_00000000")
    assert {key.split(":")[0] for key in before} == {"master", "exp_avg", "exp_avg_sq"}
    assert differing(before, after) == []
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx([loss for loss, _ in expected[0][MOVED_AT:]], rel=1e-6)
        assert [norm for _, norm in rank] == pytest.approx([norm for _, norm in expected[0][MOVED_AT:]], rel=1e-5)


def initial_state(rank: int, size: int, case: Case, root: Path) -> None:
    save(build(case), root, 0, rank)


@pytest.mark.parametrize("offload", [MIXED, LOW_BITS])
def test_bf16_masters_start_from_full_precision(worker_pools: Any, tmp_path: Path, offload: OffloadConfig) -> None:
    case = on(2, offload, precision="bf16")
    for name, each in (("plain", case.without_offload()), ("offloaded", case)):
        worker_pools(2, case.pool).run(initial_state, each, tmp_path / name)
    plain, offloaded = (state_of(tmp_path / name / "step_00000000") for name in ("plain", "offloaded"))
    assert {key.split(":")[0] for key in offloaded} == {"master"}
    assert differing(plain, offloaded) == []
    rounded = [name for name, value in offloaded.items() if not (value.bfloat16().float() == value).all()]
    assert len(rounded) > len(offloaded) / 2  # or full precision was not needed


def back_to_the_start(rank: int, size: int, case: Case, start: Path) -> tuple[Any, Any, dict[str, float]]:
    """Results of two steps, and of the same two after the state before them was taken over again."""
    engine = build(case)
    save(engine, start, 0, rank)
    first = run_steps(engine, case, range(2))
    engine.import_state(CheckpointReader(start / "step_00000000"))
    scalars = engine.scalar_state()
    return first, run_steps(engine, case, range(2)), scalars


def test_a_trained_engine_takes_over_the_state_before_the_first_step(worker_pools: Any, tmp_path: Path) -> None:
    case = on(2, LOW_BITS, precision="bf16")
    for first, again, scalars in worker_pools(2, case.pool).run(back_to_the_start, case, tmp_path):
        assert first == again
        assert scalars == {"step": 0.0}


def replanned(rank: int, size: int, case: OffloadCase, root: Path) -> list[tuple[float, float]]:
    """Four steps, with another plan after each."""
    engine = build(case)
    states = engine.offload.states
    results = []
    for step, (fraction, resident) in enumerate(((1.0, 0.0), (0.0, 0.5), (0.5, 1.0), (0.3, 0.3))):
        states.replan(even_plan(states.shape, fraction, resident, overlap=step % 2 == 0))
        results += run_steps(engine, case, range(step, step + 1))
    save(engine, root, NUM_STEPS, rank)
    return results


def test_a_plan_may_change_between_steps(worker_pools: Any, tmp_path: Path) -> None:
    case = on(2, LOW_BITS, precision="bf16")
    pool = worker_pools(2, case.pool)
    expected = pool.run(train_and_save, case, tmp_path / "one", NUM_STEPS)
    assert pool.run(replanned, case, tmp_path / "many") == expected
    last = f"step_{NUM_STEPS:08d}"
    assert not differing(state_of(tmp_path / "one" / last), state_of(tmp_path / "many" / last))
