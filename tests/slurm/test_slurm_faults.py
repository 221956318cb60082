"""What happens to a run on a real Slurm when things go wrong: exit class, action, and the same losses in the end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.command import Outcome, pretrain
from support.faults import fault, faulty
from support.matrix import rotating
from support.slurm_cluster import SlurmCluster
from support.slurm_run import SlurmRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


# Each of these alone, in turn; one run that meets all of them is in test_slurm_gauntlet.py.
@pytest.mark.parametrize(
    ("kind", "exit_class", "action"),
    rotating(
        [("kill", "killed", "restart"), ("raise", "crash", "restart"), ("host_memory", "host_memory", "requeue")], 1
    ),
)
def test_a_rank_that_dies(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path, kind: str, exit_class: str, action: str
) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault(kind, 5, rank=1, once=tmp_path / "once")))
    assert run.wait() == [(exit_class, action), ("finished", "stop")]
    assert run.outcome.losses() == undisturbed
    first = run.events("attempt_ended")[0]
    assert (first["rank"], first["node"], first["saved_step"], first["last_step"]) == (1, "node2", 4, 4)


def test_device_memory_stops_the_run(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("device_memory", 3, rank=0)))
    assert run.wait() == [("device_memory", "stop")]
    assert "train.micro_batch_size" in run.events("attempt_ended")[0]["reason"]


@pytest.mark.parametrize("kind", [kind for (kind,) in rotating([("spin",), ("lonely_collective",)], 1)])
def test_a_rank_that_hangs(slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path, kind: str) -> None:
    run = SlurmRun(
        slurm, tmp_path / "run", *tiny, "lifecycle.hang_timeout_s=8",
        *faulty(fault(kind, 5, rank=1, once=tmp_path / "once")),
    )  # fmt: skip
    assert run.wait() == [("hang", "restart"), ("finished", "stop")]
    assert run.outcome.losses() == undisturbed
    end = run.events("attempt_ended")[0]
    report = Path(end["report"]).read_text()
    if kind == "spin":
        assert (end["rank"], end["node"]) == (1, "node2")
        assert "faulty.py" in report  # where it stands, from its stack
    else:  # two ranks wait in different collectives: both are named
        assert "rank 0" in report
    assert "rank 1" in report


def test_not_a_number_stops_by_default(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("not_a_number", 5, rank=1)))
    assert run.wait() == [("nonfinite", "stop")]
    assert max(run.outcome.losses()) == 4


@pytest.mark.parametrize("policy", [policy for (policy,) in rotating([("skip",), ("rollback",)], 1)])
def test_not_a_number_is_passed_over(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path, policy: str
) -> None:
    bad = faulty(fault("not_a_number", 5, rank=1))
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *bad, f"health.on_nonfinite={policy}")
    assert run.wait() == [("finished", "stop")]
    losses = run.outcome.losses()
    assert {step: losses[step] for step in range(1, 5)} == {step: undisturbed[step] for step in range(1, 5)}
    # The same policy on the same numbers, without Slurm.
    path = tmp_path / "local"
    result = pretrain(
        "run",
        "--run-dir",
        path,
        *tiny,
        *bad,
        f"health.on_nonfinite={policy}",
        "launcher.num_processes=2",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert str(losses) == str(Outcome(path).losses())  # as text: a skipped step's loss is not a number


def test_two_by_two_equals_four_local_processes(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, processes=4)
    path = tmp_path / "local"
    result = pretrain("run", "--run-dir", path, *tiny, "launcher.num_processes=4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run.wait() == [("finished", "stop")]
    assert run.outcome.losses() == Outcome(path).losses()
    logs = sorted(file.name for file in (run.path / "logs" / "attempt_0001").glob("rank_*.log"))
    assert logs == [f"rank_{rank:05d}.log" for rank in range(4)]


def test_two_runs_at_the_same_moment(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    command = ["-m", "pretrain.cli", "run", *tiny, "launcher=slurm", "cluster.partition=low", f"run.root={tmp_path}"]
    import sys

    both = [
        subprocess.Popen([sys.executable, *command], env=slurm.environment, cwd=tmp_path, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    folders = sorted(path.parent for path in tmp_path.glob("*/config.yaml"))
    assert len(folders) == 2
