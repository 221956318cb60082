"""Submission, start and node check on a real Slurm."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from support.slurm_cluster import SlurmCluster, wait_until

from launchers.lifecycle.journal import read_journal
from launchers.run_dir import RunDir, RunDirectoryError
from launchers.slurm.commands import Slurm, SlurmError
from launchers.slurm.start import start_record
from launchers.slurm.submit import latest_script, live_job, submission_lock, submit
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 90.0


@pytest.fixture
def client(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Slurm's commands for this cluster; they and the code under test find it by SLURM_CONF."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return Slurm(slurm.environment)


def run_directory(path: Path) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path)


def config_of(cluster: dict[str, Any] | None = None, **launcher: Any) -> Config:
    return Config(
        launcher=SlurmConfig(**{"num_nodes": 2, "num_processes": 4, "device": "cpu", **launcher}),
        cluster=ClusterConfig(**(cluster or {})),
    )


def stand_in(folder: Path, body: str) -> str:
    """An interpreter for the batch script that does ``body`` in place of the supervisor."""
    path = folder / "interpreter"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_run_is_submitted_with_what_it_asks_for(client: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "demo")
    body = f'printf "%s\\n" "$@" "$SLURM_JOB_NUM_NODES" "$SLURM_NTASKS_PER_NODE" "$NOTE" > {tmp_path}/seen'
    cluster = {
        "partition": "low",
        "environment": {"NOTE": "it's here"},
        "exclude": ["node1"],
        "python": stand_in(tmp_path, body),
    }
    job = submit(run, config_of(cluster, time_limit="00:07:00"), "first", ["node2"], slurm=client)
    info = client.job(job)
    assert info is not None
    assert (info.name, info.partition, info.time_limit_s) == ("demo", "low", 420.0)
    assert set(info.excluded) == {"node1", "node2"}
    slurm.wait_for_job(job, "COMPLETED", timeout=TIMEOUT)
    assert (tmp_path / "seen").read_text().splitlines() == [
        "-m",
        "launchers.slurm.job",
        str(run.path),
        "2",
        "2",
        "it's here",
    ]
    done = client.job(job)
    assert done is not None
    assert set(done.nodes) == {"node3", "node4"}
    (entry,) = read_journal(run)
    assert (entry["event"], entry["job"], entry["kind"], entry["exclude"]) == ("submitted", job, "first", ["node2"])
    assert run.path / entry["script"] == latest_script(run.path)
    assert live_job(run, client) is None


def test_second_submission_of_a_queued_run_is_refused(client: Slurm, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "demo")
    config = config_of({"python": stand_in(tmp_path, "exec sleep 300")})
    job = submit(run, config, "first", slurm=client)
    with pytest.raises(RunDirectoryError, match=rf"job {job} of this run is (PENDING|RUNNING|CONFIGURING) already"):
        submit(run, config, "resume", slurm=client)
    assert len(read_journal(run)) == 1


def test_two_submissions_at_one_moment_queue_one_job(client: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "demo")
    program = (
        "import sys; from pathlib import Path; from launchers.slurm.submit import submission_lock;"
        "from launchers.run_dir import RunDir\n"
        f"with submission_lock(RunDir(Path({str(run.path)!r}))): print('in', flush=True); sys.stdin.read()"
    )
    import subprocess

    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(RunDirectoryError, match="another process is submitting this run"):
            submit(run, config_of(), "first", slurm=client)
        other.communicate(b"")
    with submission_lock(run):
        pass
    assert slurm.run("squeue", "-h") == ""


def test_refused_submission_leaves_a_run_that_can_be_submitted_later(
    client: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    run = run_directory(tmp_path / "demo")
    with pytest.raises(SlurmError, match=r"(?s)invalid partition.*cluster\.partition.*pretrain resume") as caught:
        submit(run, config_of({"partition": "nope"}), "first", slurm=client)
    assert not caught.value.transient
    assert read_journal(run) == []
    job = submit(run, config_of({"python": "/bin/true"}), "resume", slurm=client)
    slurm.wait_for_job(job, "COMPLETED", timeout=TIMEOUT)


def test_user_without_permission_is_told_the_partition(client: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can act as another user")
    folder = slurm.root / "bin"
    folder.mkdir(exist_ok=True)
    wrapper = folder / "sbatch"
    wrapper.write_text(
        '#!/bin/sh\ncd /; exec setpriv --reuid=65534 --regid=65534 --clear-groups /usr/bin/sbatch "$@"\n'
    )
    wrapper.chmod(0o755)
    script = slurm.root / "allowed.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --partition=staff\n#SBATCH --output=/dev/null\ntrue\n")
    as_nobody = Slurm(slurm.environment | {"PATH": f"{folder}:{slurm.environment['PATH']}"})
    with pytest.raises(
        SlurmError, match=r"group not permitted to use this partition.*choose another cluster\.partition"
    ):
        as_nobody.submit(script)


def test_requeue_keeps_the_job_and_leaves_the_node_out(client: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "demo")
    config = config_of(
        {"python": stand_in(tmp_path, f'echo "$SLURM_JOB_NODELIST" >> {tmp_path}/lives; exec sleep 300')}
    )
    job = submit(run, config, "first", slurm=client)
    slurm.wait_for_job(job, "RUNNING", timeout=TIMEOUT)
    wait_until(lambda: (tmp_path / "lives").exists(), "the first life")
    client.requeue(job, ["node2"])
    wait_until(lambda: len((tmp_path / "lives").read_text().splitlines()) == 2, "the second life", TIMEOUT)
    info = client.job(job)
    assert info is not None
    assert (info.restarts, info.excluded) == (1, ("node2",))
    assert "node2" not in info.nodes
    assert len(info.nodes) == 2


def test_what_slurm_knows_of_nodes_and_partitions(client: Slurm, slurm: SlurmCluster) -> None:
    slurm.run("scontrol", "update", "nodename=node4", "state=drain", "reason=bad fan")
    nodes = client.nodes(["node1", "node4", "node9"])
    assert {name: info.is_usable for name, info in nodes.items()} == {"node1": True, "node4": False}
    assert nodes["node4"].reason.startswith("bad fan")
    assert (nodes["node1"].cpus, nodes["node1"].address) == (8, slurm.addresses["node1"])
    partitions = client.partitions()
    assert partitions["short"].max_time_s == 600.0
    assert (partitions["closed"].state, partitions["low"].is_default) == ("DOWN", True)
    assert partitions["staff"].allowed_groups == ("root",)
    assert client.config()["KillWait"].split()[0] == "5"
    assert client.expand("node[1-2,4]") == ("node1", "node2", "node4")
    assert client.job(987654) is None


# The batch step of these jobs is a Python program beside this file: start.rank_command acts inside an allocation.
STEP = """
import json, subprocess, sys, time
from pathlib import Path
from launchers.run_dir import RunDir
from launchers.slurm.node_check import check_nodes
from launchers.slurm.start import Allocation, rank_command
from tests_step_config import config
run, words = RunDir(Path(sys.argv[1])), sys.argv[2:]
allocation = Allocation.read()
if words[0] == "check":
    for attempt in (1, 2):
        run.attempt_path(attempt).mkdir(parents=True)
        faults = check_nodes(config, run, attempt, allocation)
        (run.path / "faults").write_text(json.dumps(faults))
        (run.path / "faults").rename(run.path / f"faults_{attempt}")
        while attempt == 1 and not (run.path / "go").exists():
            time.sleep(0.05)
else:
    argv, env = rank_command(config, run, 1, allocation, words)
    sys.exit(subprocess.run(argv, env=env).returncode)
"""
CONFIG = """
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config
config = Config(launcher=SlurmConfig(**{launcher}), cluster=ClusterConfig(**{cluster}))
"""


def start_step(
    slurm: SlurmCluster, run: RunDir, words: list[str], options: list[str], cluster: dict[str, Any], **launcher: Any
) -> int:
    """Submits a job that starts ranks as the supervisor does; returns its id."""
    (run.path / "step.py").write_text(STEP)
    (run.path / "tests_step_config.py").write_text(CONFIG.format(launcher=launcher, cluster=cluster))
    script = run.path / "step.sh"
    command = " ".join(["exec", sys.executable, str(run.path / "step.py"), str(run.path), *words])
    script.write_text(f"#!/bin/bash\nexport PYTHONPATH={REPOSITORY}:{run.path}\n{command}\n")
    output = slurm.run("sbatch", "--parsable", "--no-kill", f"--output={run.path}/job.log", *options, script)
    return int(output)


RANK = 'echo "$SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $SLURM_NODEID $SLURM_NNODES $MASTER_ADDR $MASTER_PORT" \
"$OMP_NUM_THREADS $PRETRAIN_ATTEMPT $SLURMD_NODENAME $NOTE"'


def test_ranks_get_the_process_contract(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    rank = tmp_path / "rank"
    rank.write_text(f"#!/bin/bash\n{RANK}\nexit $((SLURM_PROCID == 3 ? 85 : 0))\n")
    rank.chmod(0o755)
    job = start_step(
        slurm,
        run,
        [str(rank)],
        ["-N2", "--ntasks-per-node=2", "--cpus-per-task=2"],
        {"environment": {"NOTE": "here", "NCCL_DEBUG": "WARN"}},
        num_processes=4,
        num_nodes=2,
    )
    slurm.wait_for_job(job, "FAILED", timeout=TIMEOUT)
    assert slurm.job(job)["ExitCode"] == "85:0"
    record = start_record(run, 1)
    assert record is not None
    first = slurm.addresses["node1"]
    assert (record["nodes"], record["address"]) == (["node1", "node2"], first)
    assert record["environment"]["NCCL_DEBUG"] == "WARN"
    lines = [(run.attempt_path(1) / f"rank_{i:05d}.log").read_text().strip() for i in range(4)]
    port = record["port"]
    assert lines == [f"{i} 4 {i % 2} {i // 2} 2 {first} {port} 2 1 node{i // 2 + 1} here" for i in range(4)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to tell them apart")
def test_ranks_of_a_node_are_bound_to_cores_of_their_own(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    rank = tmp_path / "rank"
    rank.write_text("#!/bin/bash\ngrep Cpus_allowed_list /proc/self/status\n")
    rank.chmod(0o755)
    with SlurmCluster(1, cpus=2, task_plugin="task/affinity") as cluster:
        options = ["-N1", "--ntasks-per-node=2"]
        job = start_step(cluster, run, [str(rank)], options, {}, num_processes=2, num_nodes=1)
        cluster.wait_for_job(job, "COMPLETED", timeout=TIMEOUT)
    allowed = [run.rank_log_path(1, i).read_text().split()[-1] for i in range(2)]
    assert len(set(allowed)) == 2
    assert all(cpus.isdigit() for cpus in allowed)


def test_all_ranks_get_the_signal_that_is_sent_to_the_step(client: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    rank = tmp_path / "rank"
    rank.write_text("#!/bin/bash\ntrap 'echo asked; exit 85' TERM\necho up\nwhile :; do sleep 0.1; done\n")
    rank.chmod(0o755)
    job = start_step(slurm, run, [str(rank)], ["-N2", "--ntasks-per-node=1"], {}, num_processes=2, num_nodes=2)
    logs = [run.rank_log_path(1, i) for i in range(2)]
    wait_until(lambda: all(log.exists() and "up" in log.read_text() for log in logs), "both ranks", TIMEOUT)
    step = client.step(job, "attempt_0001")
    assert step == f"{job}.0"
    client.signal_step(step, signal.SIGTERM)
    slurm.wait_for_job(job, "FAILED", timeout=TIMEOUT)
    assert slurm.job(job)["ExitCode"] == "85:0"
    assert all("asked" in log.read_text() for log in logs)


def test_fewer_nodes_than_asked_for_are_refused(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    job = start_step(slurm, run, ["/bin/true"], ["-N1"], {}, num_processes=2, num_nodes=2)
    slurm.wait_for_job(job, "FAILED", timeout=TIMEOUT)
    assert "has 1 usable nodes (node1), launcher.num_nodes asks for 2" in (run.path / "job.log").read_text()


def test_interface_that_does_not_exist_is_refused(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    cluster = {"network_interface": "ib7"}
    job = start_step(slurm, run, ["/bin/true"], ["-N2"], cluster, num_processes=2, num_nodes=2)
    slurm.wait_for_job(job, "FAILED", timeout=TIMEOUT)
    assert "cluster.network_interface: 'ib7' has no address" in (run.path / "job.log").read_text()


def test_node_check_names_the_node_that_died(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    options = ["-N3", "--ntasks-per-node=1"]
    start_step(slurm, run, ["check"], options, {}, num_processes=3, num_nodes=3, device="cpu")
    wait_until(lambda: (run.path / "faults_1").exists(), "the first check", TIMEOUT)
    # Slurm has not noticed yet, as in the seconds after a node's death.
    slurm.kill_node("node2", tell=False)
    (run.path / "go").touch()
    wait_until(lambda: (run.path / "faults_2").exists(), "the second check", TIMEOUT)
    assert json.loads((run.path / "faults_1").read_text()) == {}
    assert list(json.loads((run.path / "faults_2").read_text())) == ["node2"]
    record = json.loads((run.attempt_path(1) / "node_check.json").read_text())
    assert set(record["mb_per_s"]) == {"node1 -> node2", "node2 -> node3", "node3 -> node1"}


@pytest.mark.distributed
def test_torchrun_agents_start_the_same_ranks_and_leave_signals_to_them(
    client: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    run = run_directory(tmp_path / "run")
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, sys\n"
        "def asked(*_): print('asked', flush=True); sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        "names = 'PROCID NTASKS LOCALID NODEID NNODES'.split()\n"
        "print(*(os.environ[f'SLURM_{n}'] for n in names), os.environ['MASTER_ADDR'], flush=True)\n"
        "while True: signal.pause()\n"
    )
    options = ["-N2", "--ntasks-per-node=2"]
    words = [sys.executable, str(rank)]
    job = start_step(slurm, run, words, options, {}, num_processes=4, num_nodes=2, start="torchrun")
    logs = [run.rank_log_path(1, i) for i in range(4)]
    address = slurm.addresses["node1"]
    wait_until(lambda: all(log.exists() and address in log.read_text() for log in logs), "all ranks", TIMEOUT)
    step = client.step(job, "attempt_0001")
    assert step is not None
    client.signal_step(step, signal.SIGTERM)
    slurm.wait_for_job(job, "FAILED", timeout=TIMEOUT)
    for i, log in enumerate(logs):
        assert log.read_text().split("\n")[:2] == [f"{i} 4 {i % 2} {i // 2} 2 {address}", "asked"]
