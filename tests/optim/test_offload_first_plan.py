"""The plan of a run's first steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.clocked_device import (
    SIZE,
    SUBGROUP,
    TRUTH,
    ClockedDevice,
    offload_config,
)

from pretrain.optim.offload import online, states
from pretrain.optim.offload.choose import choose_plan
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.states import OffloadedStates

STATE = 12 * SUBGROUP


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free device memory; constants are :data:`TRUTH`."""
    monkeypatch.setattr(online, "probed", lambda device, threads: TRUTH)
    return lambda num_bytes: monkeypatch.setattr(online, "free_device_bytes", lambda device: num_bytes)


def _first(**changes: Any) -> tuple[Plan, OffloadedStates]:
    weight = torch.ones(SIZE, dtype=torch.bfloat16)
    states = OffloadedStates(
        [weight], [0], offload_config(**changes), gradient_dtype=torch.float32, device=ClockedDevice(TRUTH)
    )
    return states.plan, states


def test_the_first_plan_takes_a_quarter_of_what_is_free_for_buffers(free: Callable[[int], None]) -> None:
    free(100 * STATE)
    plan, _ = _first(resident_fraction="auto")
    assert plan.num_slots == 3
    assert plan.num_early == 0  # how long the passes are is not known
    assert Place.RESIDENT not in plan.places  # nor what the model will need
    free(4 * STATE)
    assert _first()[0].num_slots == 1
    free(3 * STATE)
    assert not _first()[0].streamed


def test_the_first_plan_does_as_it_is_told(free: Callable[[int], None]) -> None:
    free(4 * STATE)
    plan, states = _first(fraction=0.5, resident_fraction=0.1)
    assert len(plan.streamed) in (4, 5)
    assert sum(place is Place.RESIDENT for place in plan.places) == 1
    assert states.device_bytes == 4 * STATE
    free(2 * STATE)
    with pytest.raises(ValueError, match="lower resident_fraction"):
        _first(fraction=0.5, resident_fraction=0.3)


def _fails_on_one(rank: int, size: int, failing: int) -> str:
    def choose(shape: Any, config: Any, device: Any) -> Plan:
        if rank == failing:
            raise ValueError("resident_fraction does not fit into 3 GiB of device memory")
        return choose_plan(shape, config, device)

    before, states.choose_plan = states.choose_plan, choose
    try:
        OffloadedStates([torch.ones(SIZE)], [0], offload_config(), gradient_dtype=torch.float32)
    except ValueError as error:
        return str(error)
    finally:
        states.choose_plan = before
    return "none"


def test_no_rank_waits_for_one_that_has_no_plan(worker_pools: Any) -> None:
    told = worker_pools(2).run(_fails_on_one, 1)
    assert told == [
        "rank 1: resident_fraction does not fit into 3 GiB of device memory",
        "resident_fraction does not fit into 3 GiB of device memory",
    ]
    assert worker_pools(2).run(_fails_on_one, -1) == ["none", "none"]
    assert worker_pools(1).run(_fails_on_one, 0) == ["resident_fraction does not fit into 3 GiB of device memory"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "16", "SLURM_NNODES": "3"}, 6),
        ({"LOCAL_WORLD_SIZE": "64"}, 16),  # a shell's own variables, for another job
        ({}, 16),
    ],
)
def test_ranks_share_the_host(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(online, "world_size", lambda: 16)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert online.ranks_on_host() == expected
