"""A preflight against a real controller: nothing is queued, and refusals have names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.slurm_cluster import SlurmCluster
from support.small_text import small_run


def _findings(slurm: SlurmCluster, data_path: Path, cwd: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    nodes = ["launcher=slurm", "launcher.num_nodes=2", "launcher.num_processes=2"]
    done = slurm.pretrain("preflight", *small_run(data_path), *nodes, *more, "--json", cwd=cwd)
    found = {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}
    return done.returncode, found


def test_a_request_that_slurm_accepts(slurm: SlurmCluster, data_path: Path, tmp_path: Path) -> None:
    code, found = _findings(slurm, data_path, tmp_path)
    assert code == 0
    assert found["sbatch --test-only"]["level"] == found["partition low"]["level"] == found["nodes"]["level"] == "ok"
    assert found["nodes"]["figures"]["idle"] == 4
    assert found["budget"]["figures"]["available"] == 64000 * 2**20
    assert slurm.run("squeue", "-h") == ""


def test_requests_that_it_would_refuse(slurm: SlurmCluster, data_path: Path, tmp_path: Path) -> None:
    more = ["cluster.partition=short", "cluster.gres=gpu:2", "cluster.memory_per_node=80G"]
    code, found = _findings(slurm, data_path, tmp_path, *more)
    errors = {what for what, finding in found.items() if finding["level"] == "error"}
    assert code == 2
    assert errors == {"launcher.time_limit", "cluster.gres", "cluster.memory_per_node"}


def test_what_only_slurm_knows(slurm: SlurmCluster, data_path: Path, tmp_path: Path) -> None:
    code, found = _findings(slurm, data_path, tmp_path, "cluster.constraint=fast")
    assert code == 2
    assert "feature" in found["sbatch --test-only"]["found"].lower()


def test_a_dead_node_is_named(slurm: SlurmCluster, data_path: Path, tmp_path: Path) -> None:
    slurm.run("scontrol", "update", "nodename=node2", "state=drain", "reason=fan")
    code, found = _findings(
        slurm, data_path, tmp_path, "launcher.num_nodes=4", "launcher.num_processes=4", "train.micro_batch_size=1"
    )
    slurm.run("scontrol", "update", "nodename=node2", "state=resume")
    assert code == 0
    assert found["nodes"]["level"] == "warning"
    assert "node2" in found["nodes"]["found"]
    assert "fan" in found["nodes"]["found"]


def test_no_controller(slurm: SlurmCluster, data_path: Path, tmp_path: Path) -> None:
    nodes = ["launcher=slurm", "launcher.num_nodes=2", "launcher.num_processes=2"]
    words = ["preflight", *small_run(data_path), *nodes]
    for variables in ({"SLURM_CONF": "/no/such/file"}, {"PATH": "/no/such/folder"}):
        done = slurm.pretrain(*words, cwd=tmp_path, environment=variables)
        assert done.returncode == 2
        assert "a Slurm cluster that answers" in done.stdout
