"""One real Slurm cluster for all tests that need it, started on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.slurm_cluster import SlurmCluster, missing_programs


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
