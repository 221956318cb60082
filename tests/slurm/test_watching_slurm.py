"""Watching and cancelling runs whose jobs are real ones of Slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.slurm_cluster import SlurmCluster, wait_until
from support.watched_run import WatchedRun

from launchers.lifecycle.journal import read_journal
from launchers.watch.state import State
from launchers.watch.summary import summarise_all, summarise_one


@pytest.fixture
def cluster(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, also as this process's own."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    return slurm


def submit(cluster: SlurmCluster, run: WatchedRun, *options: str) -> int:
    output = run.path / "slurm" / "job_%j.log"
    output.parent.mkdir(exist_ok=True)
    wrap = ["-p", "low", "--time=60", f"--output={output}", "--wrap=echo begun; sleep 600"]
    job = int(cluster.run("sbatch", "--parsable", *options, *wrap))
    run.submitted(job)
    return job


def status(cluster: SlurmCluster, run: WatchedRun) -> dict[str, Any]:
    return json.loads(cluster.pretrain("status", run.path, "--json").stdout)  # type: ignore[no-any-return]


def test_one_question_tells_of_all_jobs(cluster: SlurmCluster, tmp_path: Path) -> None:
    held, active, gone, forgotten = (WatchedRun(tmp_path / name) for name in ("held", "active", "gone", "forgotten"))
    waiting = submit(cluster, held, "--hold")
    running = submit(cluster, active)
    killed = submit(cluster, gone, "--hold")
    cluster.run("scancel", str(killed))
    forgotten.submitted(999_999)
    cluster.wait_for_job(running, "RUNNING")
    summaries, fault = summarise_all([held.path, active.path, gone.path, forgotten.path])
    assert fault is None
    assert [s.state for s in summaries] == [State.PENDING, State.STARTING, State.CANCELLED, State.LOST]
    assert summaries[0].note == f"JobHeldUser: let it go with `scontrol release {waiting}`"
    view = summaries[1].job_view
    assert view is not None
    assert (view.state, view.nodes) == ("RUNNING", "node1")
    assert view.start is not None
    assert view.end is not None
    # A single job that Slurm has forgotten is an answer, too.
    alone, fault = summarise_one(forgotten.path)
    assert (alone.state, fault) == (State.LOST, None)


def test_a_waiting_job_leaves_the_queue(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "demo")
    job = submit(cluster, run, "--hold")
    result = cluster.pretrain("cancel", run.path)
    assert result.returncode == 0, result.stderr
    assert f"demo: job {job} taken out of the queue" in result.stdout
    cluster.wait_for_job(job, "CANCELLED")
    assert status(cluster, run)["state"] == "cancelled"
    assert [entry["event"] for entry in read_journal(run.run)] == ["submitted", "cancel_requested", "cancelled"]


def test_a_job_that_starts_meanwhile_is_asked_and_then_killed(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "demo")
    job = submit(cluster, run)
    cluster.wait_for_job(job, "RUNNING")
    # This job has no supervisor that would hear: only --now ends it.
    result = cluster.pretrain("cancel", run.path, "--no-wait")
    assert result.returncode == 0
    assert cluster.job(job)["JobState"] == "RUNNING"
    result = cluster.pretrain("cancel", run.path, "--now")
    assert result.returncode == 0, result.stderr
    assert f"cancelled job {job}" in result.stderr
    assert "demo: cancelled" in result.stdout
    cluster.wait_for_job(job, "CANCELLED")
    wait_until(lambda: status(cluster, run)["state"] == "cancelled", "the run to be cancelled")


def test_the_log_of_the_job_is_the_runs_log(cluster: SlurmCluster, tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "demo")
    job = submit(cluster, run)
    log = run.path / "slurm" / f"job_{job}.log"
    wait_until(lambda: log.is_file() and log.read_text(), "the job's first line")
    assert cluster.pretrain("logs", run.path, "--job").stdout == "begun\n"
    cluster.run("scancel", str(job))
    cluster.wait_for_job(job, "CANCELLED")
    result = cluster.pretrain("logs", "-f", run.path)
    assert result.returncode == 0
    assert result.stdout.startswith(f"==> slurm/job_{job}.log <==\nbegun\n")
    assert "demo is cancelled" in result.stderr
