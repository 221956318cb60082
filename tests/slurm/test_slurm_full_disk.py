"""A disk that fills up under a run on a real Slurm: one message, a truthful record, and a run that can go on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import faulty
from support.slurm_cluster import SlurmCluster, wait_until
from support.slurm_run import SlurmRun
from support.small_text import small_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own takes root to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_root_that_is_read_only_is_refused_before_anything_is_queued(
    slurm: SlurmCluster, data_path: Path, small_disk: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = slurm.pretrain(
        "run", *small_run(data_path), "launcher=slurm", "cluster.partition=low", f"run.root={small_disk}/runs",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    assert "read-only" in (result.stdout + result.stderr).lower()
    assert "Traceback" not in result.stderr
    assert slurm.run("squeue", "-h") == ""


def test_run_on_a_disk_that_fills_up(slurm: SlurmCluster, data_path: Path, small_disk: Path, tmp_path: Path) -> None:
    run = SlurmRun(
        slurm, small_disk / "run", *small_run(data_path), "train.steps=2000", "train.micro_batch_size=1",
        "train.checkpoint_interval=5", "train.async_checkpoints=false", "train.eval_interval=0",
        "launcher.node_check=false", "launcher.max_restarts=1", *faulty(pace_s=0.1), nodes=1,
    )  # fmt: skip
    run.wait_for_step(6, timeout=240)
    filled = subprocess.run(
        ["dd", "if=/dev/zero", f"of={small_disk / 'ballast'}", "bs=4k"], capture_output=True, check=False
    )
    assert b"No space left" in filled.stderr
    job = run.job
    slurm.wait_for_job(job, "FAILED", timeout=240)
    log = (run.path / "slurm" / f"job_{job}.log").read_text()
    assert "Traceback" not in log
    status = json.loads(slurm.pretrain("status", run.path, "--json").stdout)
    assert status["state"] == "failed", status
    assert "takes no more files (No space left on device; make room there)" in log
    assert run.ends() == [("user_error", "stop")]
    (small_disk / "ballast").unlink()
    saved = max(int(folder.name.partition("_")[2]) for folder in (run.path / "checkpoints").glob("step_*"))
    result = slurm.pretrain("resume", run.path, f"train.steps={saved + 2}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    wait_until(lambda: run.ends()[-1] == ("finished", "stop"), "the resumed run", 240)
    assert "preempted" not in [name for name, _ in run.ends()]
