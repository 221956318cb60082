"""``pretrain run launcher=slurm`` and ``pretrain resume`` as their user sees them, up to the queue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.slurm_cluster import SlurmCluster

from launchers.lifecycle.journal import read_journal
from launchers.run_dir import RunDir
from pretrain.cli import main

# Rows that are made up on the spot: no data set to prepare.
RUN = [
    "experiment=induction",
    "train.micro_batch_size=8",
    "launcher=slurm",
    "launcher.num_nodes=2",
    "launcher.num_processes=4",
    "launcher.device=cpu",
    "launcher.time_limit=00:20:00",
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def site(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


def without_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with bash and nothing of Slurm's."""
    folder.mkdir()
    (folder / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(folder))


def test_dry_run_shows_plan_script_and_findings_and_writes_nothing(
    site: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *RUN, "cluster=example", "cluster.partition=low", "cluster.gres=null", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 = 4 data parallel x 1 model parallel" in out
    assert "2 node(s) x 2 rank(s), partition low" in out
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --account=my_project",
        "module load cuda/12.8",
        "export NCCL_DEBUG=WARN",
    ):
        assert f"  {line}\n" in out
    assert "Nothing was written or submitted." in out
    assert "nothing speaks against starting" in out
    assert list(tmp_path.iterdir()) == []
    assert site.run("squeue", "-h") == ""


def test_run_is_queued_resumed_and_refused_while_it_is(
    site: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nexec sleep 300\n")
    python.chmod(0o755)
    arguments = ["run", *RUN, f"cluster.python={python}", "--run-dir", "demo"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    job = int(re.search(r"job (\d+) queued: 2 node\(s\) x 2 rank\(s\)", out)[1])
    assert f"demo/slurm/job_{job}.log" in out
    assert "status demo | logs demo -f | cancel demo" in out
    run = RunDir.open("demo")
    assert [(entry["event"], entry["job"], entry["kind"]) for entry in read_journal(run)] == [
        ("submitted", job, "first")
    ]
    assert f"# job {job}," in (run.path / "command.txt").read_text()
    for again in (arguments, ["resume", "demo"]):
        assert main(again) == 3
        assert f"job {job} of this run is" in capsys.readouterr().err
    site.cancel_all()
    assert main(["resume", "demo", "launcher.time_limit=00:30:00"]) == 0
    out = capsys.readouterr().out
    assert "revision 1: launcher.time_limit" in out
    assert "#SBATCH --time=00:30:00" in (run.path / "slurm" / "job_0002.sbatch").read_text()
    assert read_journal(run)[-1]["kind"] == "resume"


def test_fault_of_the_template_comes_before_anything_is_made(
    site: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.j2").write_text("#!/bin/bash\n#SBATCH --account={{ cluster.acount }}\n")
    assert main(["run", *RUN, "launcher.template=own.j2"]) == 2
    assert re.search(r"own\.j2, line 2: .*acount", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["own.j2"]


def test_missing_sbatch_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_slurm(tmp_path / "bin", monkeypatch)
    assert main(["run", *RUN]) == 2
    error = capsys.readouterr().err
    assert "sbatch: no such command here" in error
    assert "launcher=local" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_request_that_slurm_refuses_is_found_by_preflight_and_can_be_forced(
    site: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", *RUN, "cluster.partition=nope", "--run-dir", "demo"]
    assert main(arguments) == 2
    assert "nope" in capsys.readouterr().err
    assert not Path("demo").exists()
    assert main([*arguments, "--force"]) == 2
    error = capsys.readouterr().err
    assert "Nothing was queued" in error
    assert "pretrain resume" in error
    assert main(["resume", "demo", "cluster.partition=low", "cluster.python=/bin/true"]) == 0
    assert [entry["kind"] for entry in read_journal(RunDir.open("demo"))] == ["resume"]
