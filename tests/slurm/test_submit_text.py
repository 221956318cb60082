"""What Slurm prints is read in all the shapes that releases give it; errors name a way out."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launchers.slurm.commands import Slurm, SlurmError, SlurmMissingError, parse_duration, parse_job, parse_node
from launchers.slurm.nodes import named_in
from launchers.slurm.records import parse_partition, parse_time
from launchers.slurm.start import Allocation, AllocationError, node_address

JOB = (
    "JobId=17 JobName=demo UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A Priority=1 Nice=0 Account=lab QOS=normal "
    "JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=85:0 "
    "RunTime=00:01:00 TimeLimit=1-02:00:00 TimeMin=N/A SubmitTime=1795356806 EligibleTime=1795356806 "
    "StartTime={start} EndTime={end} Deadline=N/A PreemptTime=None NodeList={nodes} BatchHost=n1 NumNodes=2 NumCPUs=8 "
    "ExcNodeList=n9 Command=/r/slurm/job_0001.sbatch WorkDir=/home/ann Comment=two words Power="
)


def test_job_of_the_controller() -> None:
    text = JOB.format(state="RUNNING", reason="None", start="1795356900", end="2026-11-23T10:00:00", nodes="n1")
    job = parse_job(text)
    assert (job.job, job.state, job.reason, job.nodes, job.restarts) == (17, "RUNNING", "", ("n1",), 2)
    assert (job.start_time, job.time_limit_s, job.exit_code, job.user) == (1795356900.0, 26 * 3600.0, 85, "ann")
    assert job.end_time == parse_time("2026-11-23T10:00:00")
    assert job.excluded == ("n9",)
    assert not job.is_final


def test_waiting_job_has_no_nodes_and_no_times() -> None:
    job = parse_job(JOB.format(state="PENDING", reason="Resources", start="Unknown", end="Unknown", nodes="n1"))
    assert (job.nodes, job.start_time, job.end_time, job.is_pending) == ((), None, None, True)


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        ("IDLE", True),
        ("ALLOCATED", True),
        ("MIXED+PLANNED", True),
        ("IDLE+DRAIN", False),
        ("DOWN*", False),
        ("IDLE*", False),
        ("ALLOCATED*+NOT_RESPONDING", False),
        ("DOWN+DRAIN+INVALID_REG", False),
        ("IDLE+CLOUD", True),
        ("IDLE+CLOUD+POWERED_DOWN", False),
    ],
)
def test_state_of_a_node(state: str, usable: bool) -> None:
    line = (
        f"NodeName=n1 Arch=x86_64 CPUTot=64 Gres=gpu:h100:8(S:0-1) NodeAddr=10.0.0.1 NodeHostName=n1 OS=Linux 6.1 SMP "
        f"RealMemory=512000 State={state} Reason=bad disk [root@2026-01-01T00:00:00]"
    )
    node = parse_node(line)
    assert node.is_usable is usable
    assert (node.cpus, node.memory_mb, node.gres, node.address) == (64, 512000, "gpu:h100:8(S:0-1)", "10.0.0.1")
    assert node.reason.startswith("bad disk")


def test_partition_with_and_without_limits() -> None:
    line = (
        "PartitionName=gpu AllowGroups=ALL AllowAccounts=lab,ops Default=YES MaxNodes={} MaxTime={} Nodes=n1 State=UP"
    )
    limited = parse_partition(line.format("4", "2-00:00:00"))
    assert (limited.max_nodes, limited.max_time_s, limited.is_default) == (4, 172800.0, True)
    assert (limited.allowed_accounts, limited.allowed_groups) == (("lab", "ops"), None)
    free = parse_partition(line.format("UNLIMITED", "UNLIMITED"))
    assert (free.max_nodes, free.max_time_s) == (None, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-01:00:01", 176401),
        ("UNLIMITED", None),
        ("1x", None),
        ("", None),
        ("-5", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


def fake_command(folder: Path, name: str, stderr: str, code: int = 1) -> Slurm:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return Slurm({"PATH": f"{folder}:/usr/bin:/bin"})


@pytest.mark.parametrize(
    ("said", "way"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", "cluster.account"),
        ("Batch job submission failed: Invalid qos specification", "cluster.qos"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "time_limit"),
        ("Batch job submission failed: User's group not permitted to use this partition", "cluster.partition"),
    ],
)
def test_refusal_names_the_field_to_change(
    said: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = fake_command(tmp_path, "sbatch", said.replace("'", "'\\''"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlurmError) as caught:
        slurm.submit(tmp_path / "x.sbatch")
    assert said.partition(": ")[2] in str(caught.value)
    assert way in str(caught.value).partition("What to do")[2]
    assert not caught.value.transient


def test_controller_that_does_not_answer_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = fake_command(tmp_path, "scontrol", "Unable to contact slurm controller (connect failure)")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlurmError) as caught:
        slurm.job(3)
    assert caught.value.transient


def test_missing_command_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmMissingError, match=r"sbatch: no such command here.*login node.*launcher=local"):
        Slurm({"PATH": str(tmp_path)}).submit("x.sbatch")


def test_variables_of_the_caller_do_not_overrule_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\nenv > "$(dirname "$0")/env"\necho 4\n')
    fake.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --partition=low\n#SBATCH --time=5\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    names = {"SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "9", "SBATCH_ACCOUNT": "mine", "SLURM_NTASKS": "3"}
    never = dict.fromkeys(("SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_WAIT"), "1")
    assert Slurm({"PATH": f"{tmp_path}:/usr/bin:/bin", **names, **never}).submit(script) == 4
    seen = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SBATCH_ACCOUNT" in seen  # the script names none: the user's default holds
    assert not seen & {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_NTASKS", *never}


def test_allocation_names_every_missing_variable() -> None:
    with pytest.raises(AllocationError, match="SLURM_JOB_NODELIST, SLURM_JOB_CPUS_PER_NODE, SLURMD_NODENAME not set"):
        Allocation.read({"SLURM_JOB_ID": "1"})


def test_allocation_without_a_node() -> None:
    whole = Allocation(job=1, nodes=("a", "b", "c"), cpus=(8, 4, 2), host="a")
    left = whole.without(["b"])
    assert (left.nodes, left.cpus) == (("a", "c"), (8, 2))
    assert whole.first(2).nodes == ("a", "b")


NAMES = {"a": "10.0.0.1", "b": "10.0.0.2", "looped": "127.0.1.1"}


def test_address_of_rank_0_is_one_that_other_nodes_reach() -> None:
    assert node_address("a", {"a": "a", "b": "b"}, NAMES.get) == "10.0.0.1"
    assert node_address("x", {"x": "192.168.1.4", "b": "b"}, NAMES.get) == "192.168.1.4"
    # Several slurmd on one machine, and a job of one node.
    assert node_address("x", {"x": "127.0.0.11", "y": "127.0.0.12"}, NAMES.get) == "127.0.0.11"
    assert node_address("x", {"x": "127.0.0.1"}, NAMES.get) == "127.0.0.1"


@pytest.mark.parametrize("own", ["looped", "127.0.0.1", "unknown"])
def test_address_is_never_silently_this_machine(own: str) -> None:
    with pytest.raises(AllocationError, match="network_interface"):
        node_address("n1", {"n1": own, "n2": "b"}, NAMES.get)


def test_nodes_blamed_by_srun() -> None:
    text = (
        "srun: error: Task launch for StepId=1.1 failed on node node3: Communication connection failure\n"
        "srun: error: Node failure on node12\nsrun: error: node1: task 0: Killed"
    )
    assert named_in(text, ["node1", "node3", "node12"]) == ["node3", "node12"]
