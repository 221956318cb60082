"""One real Slurm cluster for all tests that need it, started on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import Outcome, pretrain
from support.slurm_cluster import SlurmCluster, missing_programs
from support.small_text import small_run

STEPS = 8


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Four nodes of eight CPUs. Without Slurm the tests are skipped; with PRETRAIN_REQUIRE_SLURM=1 they fail."""
    if missing := missing_programs():
        reason = f"Slurm is not installed ({', '.join(missing)}); apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("PRETRAIN_REQUIRE_SLURM"):
            pytest.fail(f"{reason}; PRETRAIN_REQUIRE_SLURM asks for these tests")
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with all nodes idle and no jobs, whatever the test before has done; healed after the test."""
    slurm_cluster.heal()
    yield slurm_cluster
    slurm_cluster.heal()


@pytest.fixture(scope="session")
def tiny(data_path: Path) -> list[str]:
    """A run of two ranks with two micro-batches a step, eight steps, and a checkpoint every two."""
    return [
        *small_run(data_path), f"train.steps={STEPS}", "train.micro_batch_size=1", "train.checkpoint_interval=2",
        "train.async_checkpoints=false", "train.eval_interval=0", "lifecycle.heartbeat_interval_s=0.5",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of that run on this machine, without Slurm and without faults."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    result = pretrain("run", "--run-dir", path, *tiny, "launcher.num_processes=2", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    losses = Outcome(path).losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses
