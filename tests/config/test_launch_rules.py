"""Rules of launchers and clusters: each fault is named with field and way out, at once with all others."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.launch_rules import LAUNCH_RULES
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.violation import Violation

SOUND: dict[str, Any] = {
    **{f"launcher.{name}": value for name, value in vars(SlurmConfig(num_processes=4, num_nodes=2)).items()},
    **{f"cluster.{name}": value for name, value in vars(ClusterConfig()).items()},
    "engine.tensor_parallel": 1,
    "engine.pipeline_parallel": 1,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 1,
}


def violations(**changed: Any) -> list[Violation]:
    values = SOUND | {name.replace("__", "."): value for name, value in changed.items()}
    found: list[Violation] = []
    for paths, rule in LAUNCH_RULES:
        found += rule(*(values[path.removesuffix("?")] for path in paths))
    return found


def test_defaults_and_a_whole_site_are_sound() -> None:
    assert violations() == []
    assert not violations(
        launcher__template="/on/the/login/node/only.j2",  # read where the script is rendered, nowhere else
        launcher__min_nodes=1,
        launcher__time_limit="2-12:00:00",
        cluster__sbatch_options=["--mail-type=FAIL", "--exclusive", "--switches=1"],
        cluster__srun_options=["--mpi=pmix", "--container-image=site/image:1"],
        cluster__environment={"NCCL_DEBUG": "WARN", "OMP_PROC_BIND": True},
        cluster__gres="gpu:h100:{processes_per_node}",
        cluster__memory_per_node="0",
        cluster__container="apptainer exec --nv '/images/my image.sif'",
        cluster__container_python="/opt/venv/bin/python",
        cluster__exclude=["gpu-017", "gpu-018.site"],
        cluster__modules=["cuda/12.4"],
        cluster__constraint="gpu&ib",
    )


@pytest.mark.parametrize(
    ("path", "value", "fix"),
    [
        ("launcher.num_processes", 5, "launcher.num_processes=4 or launcher.num_processes=6"),
        ("launcher.min_nodes", 3, "launcher.min_nodes=2 or less"),
        ("launcher.time_limit", "soon", "12:00:00"),
        ("launcher.time_limit", "0", "12:00:00"),
        ("cluster.gres", "gpu:{ranks}", "{processes_per_node}"),
        ("cluster.memory_per_node", "64 GB", "64G"),
        ("cluster.container", "apptainer exec 'a", "close the quotes"),
        ("cluster.partition", "gpu big", "cluster.partition=null"),
        ("cluster.container_python", "/opt/bin/python", "cluster.python"),
    ],
)
def test_fault_names_field_and_way_out(path: str, value: Any, fix: str) -> None:
    (violation,) = violations(**{path.replace(".", "__"): value})
    assert (violation.path, violation.found) == (path, value)
    assert fix in violation.fix


@pytest.mark.parametrize(
    ("field", "option", "fix"),
    [
        ("sbatch_options", "--nodes=3", "set launcher.num_nodes"),
        ("sbatch_options", "-N 3", "set launcher.num_nodes"),
        ("sbatch_options", "-pgpu", "set cluster.partition"),
        ("sbatch_options", "--output=x", "remove it"),
        ("sbatch_options", "--cpus-per-task=4", "set launcher.threads_per_process"),
        ("sbatch_options", "-c4", "set launcher.threads_per_process"),
        ("sbatch_options", "--parti=gpu", "set cluster.partition"),
        ("sbatch_options", "mail-type=FAIL", "such as --mail-type"),
        ("srun_options", "--kill-on-bad-exit=1", "remove it"),
        ("srun_options", "-K1", "remove it"),
    ],
)
def test_options_that_are_set_elsewhere_are_refused(field: str, option: str, fix: str) -> None:
    (violation,) = violations(**{f"cluster__{field}": ["--comment=x", option]})
    assert violation.path == f"cluster.{field}[1]"
    assert fix in violation.fix


@pytest.mark.parametrize("names", [["n1", "n[2-4]"], ["n1", "n2,n3"], ["n1", "n2 n3"]])
def test_excluded_nodes_are_single_names(names: list[str]) -> None:
    (violation,) = violations(cluster__exclude=names)
    assert (violation.path, violation.found) == ("cluster.exclude[1]", names[1])
    assert "scontrol show hostnames" in violation.fix


@pytest.mark.parametrize("name", ["SLURM_PROCID", "MASTER_ADDR", "RANK", "MY-VAR"])
def test_variables_that_ranks_get_otherwise_are_refused(name: str) -> None:
    (violation,) = violations(cluster__environment={"GOOD": 1, name: "1"})
    assert violation.path == f"cluster.environment.{name}"


def test_smallest_layout_of_an_elastic_run_must_be_possible() -> None:
    # 3 nodes x 2 ranks, batch 12: 1, 2 and 3 nodes divide it; with 4 ranks of tensor parallelism only 2 of 4 do.
    sound = {"launcher__num_nodes": 3, "launcher__num_processes": 6, "train__global_batch_size": 12}
    assert violations(**sound, launcher__min_nodes=1) == []
    layout = {"launcher__num_nodes": 4, "launcher__num_processes": 8, "engine__tensor_parallel": 4}
    assert violations(**layout, launcher__min_nodes=2) == []
    (violation,) = violations(**layout, launcher__min_nodes=1)
    assert violation.path == "launcher.min_nodes"
    assert violation.fix.startswith("one of 2, 4")
