"""What happens to a run on a real Slurm when nodes die or the queue takes them: exit class, action, the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import fault, faulty
from support.matrix import rotating
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


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


def _preempt(slurm: SlurmCluster, run: SlurmRun, gate: Path) -> None:
    """By a job of higher priority that takes all nodes."""
    urgent = int(slurm.run("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "--wrap=true", cwd=gate.parent))
    wait_until(lambda: "asked" in run.describe(), "the ranks to be asked to stop", 30)
    gate.touch()
    slurm.wait_for_job(urgent, "COMPLETED", timeout=60)
    assert run.wait() == [("preempted", "requeue"), ("finished", "stop")]
    assert run.events("attempt_ended")[0]["saved_step"] == 5  # the step under way was finished, nothing is lost
    assert len(run.events("submitted")) == 1  # the same job came back


def _requeue(slurm: SlurmCluster, run: SlurmRun, gate: Path) -> None:
    """From outside."""
    slurm.run("scontrol", "requeue", str(run.job))
    gate.touch()
    assert run.wait()[-1] == ("finished", "stop")
    assert len(run.events("attempt_started")) == 2


def _kill_a_node(slurm: SlurmCluster, run: SlurmRun, gate: Path) -> None:
    """The run goes on elsewhere."""
    slurm.kill_node("node2")
    gate.touch()
    first, last = run.wait()
    # Slurm itself queues a job again that has lost a node, unless the supervisor sees it first.
    assert first in [("node_failure", "requeue"), ("node_failure", "exclude")]
    assert last == ("finished", "stop")
    assert "node2" not in run.events("attempt_started")[1]["nodes"]


def _kill_the_batch_host(slurm: SlurmCluster, run: SlurmRun, gate: Path) -> None:
    """The supervisor goes with it."""
    slurm.kill_node(run.events("attempt_started")[0]["nodes"][0])
    gate.touch()
    assert run.wait()[-1] == ("finished", "stop")
    assert "node1" not in run.events("attempt_started")[1]["nodes"]


_EVENTS = [(_preempt,), (_requeue,), (_kill_a_node,), (_kill_the_batch_host,)]


# Each of these alone, in turn; one run that meets all of them is in test_slurm_gauntlet.py.
@pytest.mark.parametrize("happen", [happen for (happen,) in rotating(_EVENTS, 1)])
def test_the_nodes_are_taken_and_the_run_goes_on(
    slurm: SlurmCluster,
    tiny: list[str],
    undisturbed: dict,
    tmp_path: Path,
    happen: Callable[[SlurmCluster, SlurmRun, Path], None],
) -> None:
    gate = tmp_path / "gate"
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, until=gate)))
    run.wait_for_step(4)
    happen(slurm, run, gate)
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
