"""A submission that Slurm does not confirm, and jobs that the journal does not know: never a second job of a run."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, cast

import pytest
from support.slurm_cluster import SlurmCluster

from launchers.lease import Lease, LeaseHeldError
from launchers.lifecycle.journal import append, read_journal
from launchers.run_dir import RunDir
from launchers.slurm import job as job_program
from launchers.slurm.commands import JobInfo, Slurm, SlurmError
from launchers.slurm.submit import live_job, refuse_if_queued, submit
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config


class Controller:
    """A controller with ``jobs`` (id to state and script) that may take a job without saying so."""

    def __init__(self, jobs: dict[int, tuple[str, str]] | None = None, *, silent: bool = False, takes: bool = True):
        self.jobs = jobs or {}
        self.silent, self.takes = silent, takes

    def submit(self, script: Path, *_: Any) -> int:
        if self.takes:
            self.jobs[max(self.jobs, default=0) + 1] = ("PENDING", str(script))
        if self.silent:
            raise SlurmError("sbatch: no answer within 60 s", transient=True)
        return max(self.jobs)

    def jobs_of_script(self, script: Path) -> list[int]:
        return [job for job, (_, own) in self.jobs.items() if own == str(script)]

    def job(self, job: int) -> JobInfo | None:
        return JobInfo(job=job, state=self.jobs[job][0], reason="") if job in self.jobs else None

    @property
    def slurm(self) -> Slurm:
        return cast(Slurm, self)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("launchers.slurm.submit._LOOK_AGAIN_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return RunDir.create({"run": {"name": "demo"}, "train": {"steps": 10}}, path=tmp_path / "demo")


CONFIG = Config(
    launcher=SlurmConfig(num_nodes=2, num_processes=2, device="cpu"), cluster=ClusterConfig(python="/bin/true")
)


def test_a_job_that_came_of_an_unconfirmed_submission_is_found(run: RunDir) -> None:
    assert submit(run, CONFIG, "first", slurm=Controller(silent=True).slurm) == 1
    assert [(entry["event"], entry["job"]) for entry in read_journal(run)] == [("submitted", 1)]
    assert (run.path / "slurm" / "job_0001.sbatch").is_file()


def test_without_a_sign_of_it_nothing_is_claimed_and_it_is_looked_for_again(run: RunDir) -> None:
    controller = Controller(silent=True, takes=False)
    with pytest.raises(SlurmError, match="It is not known whether the job was queued") as caught:
        submit(run, CONFIG, "first", slurm=controller.slurm)
    assert "Nothing was queued" not in str(caught.value)
    script = run.path / "slurm" / "job_0001.sbatch"
    assert script.is_file()
    # Slurm had taken it all the same.
    controller.jobs[5] = ("PENDING", str(script))
    controller.silent, controller.takes = False, True
    with pytest.raises(LeaseHeldError, match="job 5 of this run is PENDING already"):
        submit(run, CONFIG, "resume", slurm=controller.slurm)
    # From now on it is the run's: `pretrain cancel` finds it.
    assert [(entry["event"], entry["job"]) for entry in read_journal(run)] == [("submitted", 5)]
    controller.jobs[5] = ("COMPLETED", str(script))
    assert submit(run, CONFIG, "resume", slurm=controller.slurm) == 6


def test_a_run_at_work_in_a_job_that_the_journal_never_got_is_not_submitted_again(run: RunDir) -> None:
    controller = Controller({7: ("RUNNING", "elsewhere")})
    with Lease.acquire(run, job="7"):
        with pytest.raises(LeaseHeldError, match="job 7 of this run is RUNNING already"):
            submit(run, CONFIG, "resume", slurm=controller.slurm)
        controller.jobs.clear()  # a job of another cluster
        with pytest.raises(LeaseHeldError, match=f"held by process {os.getpid()} on {socket.gethostname()}"):
            submit(run, CONFIG, "resume", slurm=controller.slurm)
        controller.jobs[7] = ("CANCELLED", "elsewhere")
        assert live_job(run, controller.slurm) is None
    controller.jobs[8] = ("RUNNING", "elsewhere")
    append(run, "attempt_started", attempt=2, launcher="slurm", job=8, nodes=["n1"], num_processes=2)
    with pytest.raises(LeaseHeldError, match="job 8 of this run is RUNNING already"):
        submit(run, CONFIG, "resume", slurm=controller.slurm)


def test_a_queued_run_is_not_continued_beside_slurm(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = Controller({3: ("PENDING", "")})
    monkeypatch.setattr("launchers.slurm.submit.Slurm", lambda: controller)
    refuse_if_queued(run)  # no job was ever submitted: Slurm is not asked
    append(run, "submitted", job=3, script="slurm/job_0001.sbatch", kind="first", exclude=[])
    with pytest.raises(LeaseHeldError, match=r"job 3 of this run is PENDING already.*pretrain cancel"):
        refuse_if_queued(run)
    controller.jobs[3] = ("COMPLETED", "")
    refuse_if_queued(run)
    monkeypatch.setattr(Controller, "job", lambda *_: (_ for _ in ()).throw(SlurmError("scontrol: no such command")))
    refuse_if_queued(run)
    assert "cannot be asked" in capsys.readouterr().err


def test_a_job_of_a_run_that_went_on_elsewhere_says_so(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_program, "check", lambda tree: Config())
    monkeypatch.setattr(job_program.signal, "signal", lambda *_: None)
    assert job_program.main([str(run.path)]) == 3
    assert "continued with launcher=local" in capsys.readouterr().err


def test_slurm_tells_the_jobs_of_a_script(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    client = Slurm(slurm.environment)
    script = tmp_path / "job_0001.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nexec sleep 300\n")
    assert client.jobs_of_script(script) == []
    job = client.submit(script)
    client.submit(_other(tmp_path))
    assert client.jobs_of_script(script) == [job]
    client.cancel(job)
    slurm.wait_for_job(job, "CANCELLED")
    assert client.jobs_of_script(script) == [job]


def _other(folder: Path) -> Path:
    path = folder / "job_0002.sbatch"
    path.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\ntrue\n")
    return path
