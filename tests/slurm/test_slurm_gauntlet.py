"""One run that meets one fault after the other on a real Slurm, and still ends where the undisturbed run ends.

Each fault alone is in test_slurm_faults.py and test_slurm_nodes.py, in turns; together they need half the starts of
processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import Outcome, pretrain
from support.faults import fault, faulty
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.small_text import small_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 14


@pytest.fixture(scope="module")
def tiny(data_path: Path) -> list[str]:
    """Two ranks with two micro-batches a step; a checkpoint every two steps."""
    return [
        *small_run(data_path), f"train.steps={STEPS}", "train.micro_batch_size=1", "train.checkpoint_interval=2",
        "train.async_checkpoints=false", "train.eval_interval=0", "lifecycle.heartbeat_interval_s=0.5",
        "launcher.node_check=false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the same run on this machine, without Slurm and without faults."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = [each for each in tiny if not each.startswith("launcher.")]
    result = pretrain("run", "--run-dir", path, *settings, "launcher.num_processes=2", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    losses = Outcome(path).losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def test_faults_of_ranks(slurm: SlurmCluster, tiny: list[str], undisturbed: dict[int, float], tmp_path: Path) -> None:
    faults = [
        fault(kind, step, rank=1, once=tmp_path / kind)
        for kind, step in [("kill", 4), ("raise", 6), ("host_memory", 8), ("spin", 10), ("lonely_collective", 12)]
    ]
    run = SlurmRun(
        slurm,
        tmp_path / "run",
        *tiny,
        *faulty(*faults),
        "lifecycle.hang_timeout_s=8",
        "lifecycle.on_host_memory=restart",
    )
    ends = run.wait(400)
    assert ends == [
        *((name, "restart") for name in ("killed", "crash", "host_memory", "hang", "hang")),
        ("finished", "stop"),
    ]
    assert run.outcome.losses() == undisturbed
    ended = run.events("attempt_ended")
    # The fault comes in the second step after a checkpoint: one step is lost each time.
    assert [(entry["last_step"], entry["saved_step"]) for entry in ended[:5]] == [(s, s - 1) for s in (3, 5, 7, 9, 11)]
    assert [(entry["rank"], entry["node"]) for entry in ended[:4]] == [(1, "node2")] * 4
    spin, lonely = (Path(entry["report"]).read_text() for entry in ended[3:5])
    assert "rank 1 on node2" in spin
    assert "faulty.py" in spin  # where it stands, from its stack
    assert {"rank 0", "rank 1"} <= {f"rank {rank}" for rank in (0, 1) if f"rank {rank}" in lonely}
    assert len(run.events("submitted")) == 1
    status = run.cluster.pretrain("status", run.path).stdout
    assert "5 (at most 20 after faults)" in status


def test_faults_of_nodes_and_queue(
    slurm: SlurmCluster, tiny: list[str], undisturbed: dict[int, float], tmp_path: Path
) -> None:
    gates = {step: tmp_path / f"gate{step}" for step in (3, 5, 7, 9)}
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(*(fault("hold", step, until=gates[step]) for step in gates)))

    run.wait_for_step(2)
    urgent = int(slurm.run("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap=true", cwd=tmp_path))
    wait_until(lambda: "asked" in run.describe(), "the ranks to be asked to stop", 30)
    gates[3].touch()
    slurm.wait_for_job(urgent, "COMPLETED", timeout=60)

    run.wait_for_step(4)
    slurm.run("scontrol", "requeue", str(run.job))
    gates[5].touch()

    run.wait_for_step(6)
    slurm.kill_node("node2")
    gates[7].touch()

    run.wait_for_step(8)
    slurm.kill_node(run.events("attempt_started")[-1]["nodes"][0])
    gates[9].touch()

    ends = run.wait(240)
    assert ends[0] == ("preempted", "requeue")
    # Slurm itself queues a job again that has lost a node, unless the supervisor sees it first.
    assert ends[2] in [("node_failure", "requeue"), ("node_failure", "exclude")]
    assert ends[3] == ("node_failure", "requeue")  # with its host the supervisor is gone, too
    assert ends[-1] == ("finished", "stop")
    started = run.events("attempt_started")
    nodes = [entry["nodes"] for entry in started]
    assert nodes[:3] == [["node1", "node2"]] * 3
    assert "node2" not in nodes[3]
    assert not {"node2", nodes[3][0]} & set(nodes[4])  # the second one to die was the batch host
    assert len({entry["job"] for entry in started}) == 1  # the same job came back each time
    assert run.outcome.losses() == undisturbed
    assert run.events("attempt_ended")[0]["saved_step"] == 3  # warned in time: the step under way was saved
