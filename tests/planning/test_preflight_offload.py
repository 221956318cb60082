"""Host memory of ``optimizer.offload`` in the preflight: exact widths, both engines, what a plan may take besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config.launch_schema import ClusterConfig, LocalConfig, SlurmConfig
from pretrain.config.schema import DeepSpeedConfig, EngineConfig, MegatronConfig, OffloadConfig, OptimizerConfig
from pretrain.config.schema import TrainConfig as Train
from pretrain.planning.preflight import host_memory
from pretrain.planning.preflight.findings import Level
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import GIB

Make = Callable[..., Subject]
NUMBERS = 10**9
RING = 3 * 10**6


def budget(
    subject: Make,
    *,
    engine: EngineConfig | None = None,
    precision: Any = "bf16",
    processes: int = 16,
    uses_gpu: bool = True,
    **offload: Any,
) -> host_memory.Budget:
    made = subject(
        engine=engine or DeepSpeedConfig(zero_stage=3),
        train=Train(precision=precision, checkpoint_interval=0),
        launcher=SlurmConfig(num_processes=processes, num_nodes=2),
        optimizer=OptimizerConfig(offload=OffloadConfig(enabled=True, **{"subgroup_size": 10**6, **offload})),
    )
    return host_memory.node_budget(made, NUMBERS, uses_gpu)


@pytest.mark.parametrize(
    ("precision", "master", "width"), [("bf16", "full", 12), ("bf16", "low_bits", 10), ("fp32", "full", 8)]
)
def test_state_has_its_exact_width(subject: Make, precision: str, master: str, width: int) -> None:
    made = budget(subject, precision=precision, master=master, fraction=1.0)
    assert made.training == pytest.approx(8 / 16 * NUMBERS * width)
    assert made.maybe == 0


def test_gradients_of_what_the_cpu_updates_wait_on_the_host(subject: Make) -> None:
    in_turn = budget(subject, fraction=0.5, overlap=False)
    assert in_turn.training == pytest.approx(8 / 16 * NUMBERS * 12 + 8 * RING * (4 + 2))
    assert in_turn.maybe == 0
    # With overlap all of them at once, where there is room for them.
    at_once = budget(subject, fraction=0.5)
    assert at_once.training == in_turn.training
    assert at_once.maybe == pytest.approx(8 / 16 * NUMBERS * 0.5 * 4 - 8 * RING * 4)


def test_what_auto_may_take_is_no_reason_to_refuse(subject: Make) -> None:
    megatron = MegatronConfig()
    auto, all_cpu = (budget(subject, engine=megatron, fraction=fraction) for fraction in ("auto", 0.0))
    assert auto.training == pytest.approx(8 / 16 * NUMBERS * 12)
    assert auto.maybe == pytest.approx(all_cpu.training + all_cpu.maybe - auto.training)
    assert auto.least < all_cpu.least
    assert auto.most == pytest.approx(all_cpu.most)


def test_resident_state_is_not_on_the_host(subject: Make) -> None:
    assert budget(subject, fraction=1, resident_fraction=0.75).training == pytest.approx(8 / 16 * NUMBERS * 12 / 4)


def test_both_engines_cut_state_over_data_parallel_ranks(subject: Make) -> None:
    megatron = MegatronConfig(tensor_parallel=2, pipeline_parallel=2)
    assert budget(subject, engine=megatron, fraction=1.0).training == pytest.approx(8 / 16 * NUMBERS * 12)
    by_stage = {budget(subject, engine=DeepSpeedConfig(zero_stage=s), fraction=1.0).training for s in (1, 2, 3)}
    assert by_stage == {8 / 16 * NUMBERS * 12.0}


def test_on_cpu_state_replaces_that_of_the_engine(subject: Make) -> None:
    plain = subject(
        engine=DeepSpeedConfig(zero_stage=2),
        train=Train(precision="bf16", checkpoint_interval=0),
        launcher=SlurmConfig(num_processes=16, num_nodes=2),
    )
    without = host_memory.node_budget(plain, NUMBERS, False)
    stage_2 = DeepSpeedConfig(zero_stage=2)
    assert budget(subject, engine=stage_2, uses_gpu=False).training == pytest.approx(without.training)
    less = budget(subject, engine=stage_2, uses_gpu=False, master="low_bits").training
    assert without.training - less == pytest.approx(8 / 16 * NUMBERS * 2)
    moved = budget(subject, engine=stage_2, uses_gpu=False, fraction=0.5).training
    assert moved - without.training == pytest.approx(8 * RING * 12)


def test_nothing_changes_while_it_is_disabled(subject: Make) -> None:
    engine = DeepSpeedConfig(zero_stage=3)
    made = subject(engine=engine, launcher=LocalConfig(num_processes=2, device="cuda"))
    assert host_memory.node_budget(made, NUMBERS, True).training == 0


@pytest.mark.parametrize(("memory", "level"), [("3G", Level.ERROR), ("2T", Level.OK)])
def test_a_node_must_hold_the_state(subject: Make, memory: str, level: Level) -> None:
    from pretrain.models.hybrid.config import HybridConfig

    made = subject(
        model=HybridConfig(pattern="M-" * 8, width=1024, vocab_size=32000),
        engine=MegatronConfig(),
        train=Train(precision="bf16", checkpoint_interval=0),
        optimizer=OptimizerConfig(offload=OffloadConfig(enabled=True, fraction=1.0)),
        launcher=SlurmConfig(num_processes=2, num_nodes=2, device="cuda"),
        cluster=ClusterConfig(memory_per_node=memory),
    )
    (found,) = host_memory.check(made)
    assert found.level is level
    assert (level is Level.OK) or "optimizer.offload.master=low_bits" in found.fix


@pytest.mark.parametrize(("limit", "refused"), [(0.001, True), (64.0, False)])
def test_the_limit_of_a_rank_is_held_against_its_need(subject: Make, limit: float, refused: bool) -> None:
    made = subject(
        engine=DeepSpeedConfig(zero_stage=1),
        train=Train(precision="bf16"),
        optimizer=OptimizerConfig(offload=OffloadConfig(enabled=True, host_memory_gib=limit)),
    )
    faults = [f for f in host_memory.check(made) if f.what == "optimizer.offload.host_memory_gib"]
    assert bool(faults) is refused
    if refused:
        assert faults[0].level is Level.ERROR
        assert faults[0].figures["needed"] > faults[0].figures["limit"] == limit * GIB
