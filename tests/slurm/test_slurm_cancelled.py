"""``scancel`` of a run at work on a real Slurm: it is over, whatever the ranks had come to, and is seen to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import fault, faulty
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.small_text import small_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def tiny(data_path: Path) -> list[str]:
    return [
        *small_run(data_path), "train.steps=2000", "train.micro_batch_size=1", "train.checkpoint_interval=2",
        "train.async_checkpoints=false", "train.eval_interval=0", "launcher.node_check=false",
    ]  # fmt: skip


def state(slurm: SlurmCluster, run: SlurmRun) -> str:
    return str(json.loads(slurm.pretrain("status", run.path, "--json").stdout)["state"])


@pytest.fixture(scope="module")
def patient(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """A cluster that leaves processes as long as they need on a busy machine; where there is none, neither is this."""
    with SlurmCluster(2, extra="KillWait=120") as cluster:
        yield cluster


def test_ranks_that_save_in_time(patient: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    slurm = patient
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(pace_s=0.1))
    run.wait_for_step(3, timeout=180)
    slurm.run("scancel", str(run.job))
    slurm.wait_for_job(run.job, "CANCELLED", timeout=120)
    assert run.ends() == [("interrupted", "stop")], run.describe()
    end = run.events("attempt_ended")[0]
    assert "the job was cancelled" in end["reason"]
    assert end["saved_step"] == end["last_step"]
    assert not run.events("requeued")
    assert state(slurm, run) == "cancelled"
    # Its user may go on with it.
    result = slurm.pretrain("resume", run.path, f"train.steps={end['last_step'] + 2}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    wait_until(lambda: run.ends()[-1] == ("finished", "stop"), "the resumed run", 180)


def test_ranks_that_are_too_slow(slurm: SlurmCluster, tiny: list[str], tmp_path: Path) -> None:
    run = SlurmRun(slurm, tmp_path / "run", *tiny, *faulty(fault("hold", 5, until=tmp_path / "never")))
    run.wait_for_step(4, timeout=180)
    slurm.run("scancel", str(run.job))
    slurm.wait_for_job(run.job, "CANCELLED", timeout=60)
    assert [entry["event"] for entry in run.journal()][2:3] == ["cancelled"], run.describe()
    assert not run.events("requeued")
    wait_until(lambda: state(slurm, run) == "cancelled", f"the state: {state(slurm, run)}\n{run.describe()}", 20)
