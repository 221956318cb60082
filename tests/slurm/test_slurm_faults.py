"""What happens to a run on a real Slurm when things go wrong: exit class, action, and the same losses in the end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.command import Outcome, pretrain
from support.faults import fault, faulty
from support.matrix import rotating
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.small_text import small_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 8

one_by_one = pytest.mark.skipif(
    os.environ.get("PRETRAIN_FULL_MATRIX") != "1",
    reason="a run meets these faults one after the other in test_slurm_gauntlet.py; each alone: PRETRAIN_FULL_MATRIX=1",
)


@pytest.fixture(scope="module")
def tiny(data_path: Path) -> list[str]:
    """Two ranks with two micro-batches a step; a checkpoint every two steps."""
    return [
        *small_run(data_path), f"train.steps={STEPS}", "train.micro_batch_size=1", "train.checkpoint_interval=2",
        "train.async_checkpoints=false", "train.eval_interval=0", "lifecycle.heartbeat_interval_s=0.5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the same run on this machine, without Slurm and without faults."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    result = pretrain("run", "--run-dir", path, *tiny, "launcher.num_processes=2", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    losses = Outcome(path).losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


@one_by_one
@pytest.mark.parametrize(
    ("kind", "exit_class", "action"),
    [("kill", "killed", "restart"), ("raise", "crash", "restart"), ("host_memory", "host_memory", "requeue")],
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


@one_by_one
@pytest.mark.parametrize("kind", ["spin", "lonely_collective"])
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


@pytest.mark.parametrize("policy", rotating([("skip",), ("rollback",)], 1))
def test_not_a_number_is_passed_over(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path, policy: tuple[str]
) -> None:
    bad = faulty(fault("not_a_number", 5, rank=1))
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *bad, f"health.on_nonfinite={policy[0]}")
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
        f"health.on_nonfinite={policy[0]}",
        "launcher.num_processes=2",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert str(losses) == str(Outcome(path).losses())  # as text: a skipped step's loss is not a number


@one_by_one
def test_preemption_by_a_job_of_higher_priority(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path
) -> None:
    gate, held = tmp_path / "gate", fault("hold", 5, until=tmp_path / "gate")
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(held))
    run.wait_for_step(4)
    urgent = int(slurm.run("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap=true", cwd=tmp_path))
    wait_until(lambda: "asked" in run.describe(), "the ranks to be asked to stop", 30)
    gate.touch()
    slurm.wait_for_job(urgent, "COMPLETED", timeout=60)
    assert run.wait() == [("preempted", "requeue"), ("finished", "stop")]
    assert run.outcome.losses() == undisturbed
    assert run.events("attempt_ended")[0]["saved_step"] == 5  # the step under way was finished, nothing is lost
    assert len(run.events("submitted")) == 1  # the same job came back


def test_the_time_limit(slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path) -> None:
    """The save is measured in the first life; until then the lead is that of ``first_save_s``, about half the limit."""
    run = SlurmRun(
        slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, rank=1, until=tmp_path / "gate")),
        'launcher.time_limit="00:02:00"', "train.checkpoint_interval=0", "lifecycle.first_save_s=30",
    )  # fmt: skip
    wait_until(lambda: "asked" in run.describe(), "the ranks to be asked to stop", 100)
    (tmp_path / "gate").touch()
    assert run.wait() == [("time_limit", "requeue"), ("finished", "stop")]
    assert run.outcome.losses() == undisturbed
    assert run.events("attempt_ended")[0]["saved_step"] == 5


@one_by_one
def test_requeued_from_outside(slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path) -> None:
    held = fault("hold", 5, until=tmp_path / "gate")
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(held))
    run.wait_for_step(4)
    slurm.run("scontrol", "requeue", str(run.job))
    (tmp_path / "gate").touch()
    ends = run.wait()
    assert ends[-1] == ("finished", "stop")
    assert len(run.events("attempt_started")) == 2
    assert run.outcome.losses() == undisturbed


@one_by_one
def test_a_node_dies_and_the_run_goes_on_elsewhere(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path
) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, until=tmp_path / "gate")))
    run.wait_for_step(4)
    slurm.kill_node("node2")
    (tmp_path / "gate").touch()
    assert run.wait() == [("node_failure", "requeue"), ("finished", "stop")]
    assert "node2" not in run.events("attempt_started")[1]["nodes"]
    assert run.outcome.losses() == undisturbed


@one_by_one
def test_the_batch_host_dies(slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, until=tmp_path / "gate")))
    run.wait_for_step(4)
    slurm.kill_node(run.events("attempt_started")[0]["nodes"][0])
    (tmp_path / "gate").touch()
    assert run.wait()[-1] == ("finished", "stop")
    assert "node1" not in run.events("attempt_started")[1]["nodes"]
    assert run.outcome.losses() == undisturbed


@pytest.mark.timeout(300)
def test_the_batch_host_of_an_elastic_run_dies_and_nobody_tells_slurm(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path
) -> None:
    run = SlurmRun(
        slurm, tmp_path / "run", *tiny, "launcher.min_nodes=1", *faulty(fault("hold", 5, until=tmp_path / "gate"))
    )
    run.wait_for_step(4)
    log = run.path / "logs" / "attempt_0001" / "guardian.log"
    wait_until(log.exists, "the guardian to be started", 30)
    slurm.kill_node(run.events("attempt_started")[0]["nodes"][0], tell=False)
    (tmp_path / "gate").touch()
    ends = run.wait()
    assert ends[0][0] in ("node_failure", "preempted")
    assert ends[-1] == ("finished", "stop")
    assert run.outcome.losses() == pytest.approx(undisturbed, rel=1e-5)


def test_a_node_that_the_run_cannot_do_without_is_waited_for(
    slurm: SlurmCluster, tiny: list[str], tmp_path: Path
) -> None:
    run = SlurmRun(
        slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, until=tmp_path / "gate")), nodes=4, processes=4
    )
    run.wait_for_step(4)
    slurm.kill_node("node2")
    (tmp_path / "gate").touch()
    # By its supervisor, or by Slurm itself where that is first.
    wait_until(lambda: slurm.job(run.job)["JobState"] == "PENDING", "the run to be queued again", 60)
    slurm.revive_node("node2")
    ends = run.wait()
    assert [name for name, _ in ends] == ["node_failure", "finished"]
    if ends[0][1] == "exclude":
        assert run.events("exclusion_lifted")[0]["nodes"] == ["node2"]
    assert len({entry["job"] for entry in run.events("attempt_started")}) == 1


def test_a_node_dies_and_fewer_go_on(slurm: SlurmCluster, tiny: list[str], undisturbed: dict, tmp_path: Path) -> None:
    run = SlurmRun(
        slurm, tmp_path / "run", *tiny, "launcher.min_nodes=1", *faulty(fault("hold", 5, until=tmp_path / "gate"))
    )
    run.wait_for_step(4)
    slurm.kill_node("node2")
    (tmp_path / "gate").touch()
    assert run.wait() == [("node_failure", "exclude"), ("finished", "stop")]
    starts = run.events("attempt_started")
    assert [(entry["nodes"], entry["num_processes"]) for entry in starts] == [(["node1", "node2"], 2), (["node1"], 1)]
    assert starts[0]["job"] == starts[1]["job"]
    losses = run.outcome.losses()
    assert losses == pytest.approx(undisturbed, rel=1e-5)  # the same data, other rounding


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
