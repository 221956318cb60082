"""Host memory: what is counted, and when it is too much."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pretrain.config.launch_schema import ClusterConfig, LocalConfig, SlurmConfig
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig, TrainConfig
from pretrain.planning.preflight import host_memory
from pretrain.planning.preflight.findings import Level
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import GIB


def test_every_rank_builds_the_whole_model(subject: Callable[..., Subject]) -> None:
    made = subject(engine=DeepSpeedConfig(zero_stage=3), launcher=SlurmConfig(num_processes=16, num_nodes=2))
    budget = host_memory.node_budget(made, 1000, uses_gpu=True)
    assert budget.building == 8 * 1000 * 4


def test_megatron_builds_a_part_on_the_gpu(subject: Callable[..., Subject]) -> None:
    made = subject(engine=MegatronConfig(tensor_parallel=2), launcher=SlurmConfig(num_processes=8, num_nodes=1))
    assert host_memory.node_budget(made, 1000, uses_gpu=True).building == 0
    assert host_memory.node_budget(made, 1000, uses_gpu=False).building == 8 * 500 * 4


def test_offload_is_shared_by_all_ranks(subject: Callable[..., Subject]) -> None:
    engine = DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    train = TrainConfig(precision="bf16", checkpoint_interval=0)
    made = subject(engine=engine, train=train, launcher=SlurmConfig(num_processes=16, num_nodes=2))
    budget = host_memory.node_budget(made, 1000, uses_gpu=True)
    assert budget.training == 8 / 16 * 1000 * (16 + 2)
    assert budget.snapshot == 0


def test_a_higher_zero_stage_needs_less_on_cpu(subject: Callable[..., Subject]) -> None:
    needs = [
        host_memory.node_budget(
            subject(engine=DeepSpeedConfig(zero_stage=stage), launcher=LocalConfig(num_processes=4)), 10**9, False
        ).training
        for stage in range(4)
    ]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4


@pytest.mark.parametrize(("memory", "level"), [("1G", Level.ERROR), ("64G", Level.OK)])
def test_the_memory_that_is_asked_for_must_do(subject: Callable[..., Subject], memory: str, level: Level) -> None:
    made = subject(
        launcher=SlurmConfig(num_processes=4, num_nodes=2, device="cuda"), cluster=ClusterConfig(memory_per_node=memory)
    )
    (found,) = host_memory.check(made)
    assert found.level is level
    assert found.figures["least"] >= 2 * host_memory.PROCESS_BYTES[True]


def test_between_the_two_figures_it_warns(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    budget = host_memory.Budget(1 * GIB, 2 * GIB, 2 * GIB, 0, 0)
    monkeypatch.setattr(host_memory, "node_budget", lambda *given: budget)
    monkeypatch.setattr(host_memory, "_available", lambda made: (4.0 * GIB, "here"))
    (found,) = host_memory.check(subject())
    assert found.level is Level.WARNING
