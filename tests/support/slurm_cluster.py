"""A real Slurm on this machine: controller, munge and several slurmd as separate nodes, up in about a second.

Nothing outside its own folder is read or written, so clusters of tests that run side by side do not meet. Nodes claim
more CPUs than the machine has; each is its own slurmd with its own port. Node names resolve nowhere, as at sites whose
names only Slurm knows; their NodeAddr are loopback addresses, one for each node.

    with SlurmCluster() as cluster:
        job = int(cluster.run("sbatch", "--parsable", "-N2", "--wrap=srun hostname"))
        cluster.wait_for_job(job, "COMPLETED")
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "munged")
FINAL_STATES = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
)
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/m.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=DisableIPv6
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=1
SlurmdTimeout=8
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
{extra}
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=10 State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=closed Nodes=ALL MaxTime=INFINITE State=DOWN PriorityTier=1 PreemptMode=OFF
PartitionName=staff Nodes=ALL MaxTime=INFINITE State=UP AllowGroups=root PriorityTier=1 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60.0, interval: float = 0.1) -> Any:
    """The first true value of ``condition``; raises AssertionError that names ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain for {what}"
        time.sleep(interval)
    return value


class SlurmCluster:
    """A running cluster: start with ``with SlurmCluster() as cluster`` (or :meth:`start` and :meth:`stop`).

    Args:
        num_nodes: nodes ``node1`` ... with ``cpus`` CPUs, ``memory_mb`` MB and ``gpus`` fake GPUs each.
        task_plugin: ``task/affinity`` binds tasks to CPUs; nodes may then claim no more than this machine has.
        extra: further lines of slurm.conf.
    """

    def __init__(
        self,
        num_nodes: int = 4,
        *,
        cpus: int = 8,
        memory_mb: int = 64000,
        gpus: int = 0,
        task_plugin: str = "task/none",
        extra: str = "",
    ) -> None:
        self.names = [f"node{i + 1}" for i in range(num_nodes)]
        self.addresses = {name: f"127.0.0.{i + 11}" for i, name in enumerate(self.names)}
        self.root = Path()
        self._size = (cpus, memory_mb, gpus)
        self._extra = extra
        self._task_plugin = task_plugin
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    # ---- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all daemons and waits until every node is idle. Raises RuntimeError with the daemons' last lines."""
        for last in (False, False, True):
            # A short path: sockets allow 107 characters.
            self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
            try:
                self._start()
                return
            except AssertionError as error:  # a port taken in between, say
                said = self.daemon_logs()
                self.stop()
                if last:
                    raise RuntimeError(f"Slurm did not start: {error}\n{said}") from error

    def _start(self) -> None:
        self.root.chmod(0o755)
        for folder in ("munge", "ctld", "spool", "run", "log"):
            (self.root / folder).mkdir(mode=0o755)
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.conf.write_text(self._conf())
        munge = [
            f"--{name}={self.root}/munge/{name.partition('-')[0]}" for name in ("pid-file", "log-file", "seed-file")
        ]
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=2"),
            *(f"--socket={self.root}/munge/m.sock", f"--key-file={key}", *munge),
        )
        wait_until(lambda: (self.root / "munge" / "m.sock").exists(), "munged", 10, 0.01)
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        for name in self.names:
            self.start_node(name)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, "all nodes to be idle", 20, 0.05)

    def stop(self) -> None:
        """Kills every process of this cluster, jobs included, and removes its folder."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        wait_until(lambda: not self._kill_processes(), "the cluster's processes to end", 20, 0.02)
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment for Slurm's commands, without variables of an outer job or tracking server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MLFLOW_"))}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": _SEARCH, "OMP_NUM_THREADS": "1"}

    def _conf(self) -> str:
        import getpass

        cpus, memory_mb, gpus = self._size
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(len(self.names) + 1)
        gres = f" Gres=gpu:{gpus}" if gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr={self.addresses[name]} Port={port} CPUs={cpus} "
            f"RealMemory={memory_mb}{gres} State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        if gpus:
            nodes.insert(0, "GresTypes=gpu")
            # Any character device serves as a GPU; plain files are refused.
            devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random"][:gpus]
            names = f"{self.names[0]}" if len(self.names) == 1 else f"node[1-{len(self.names)}]"
            (self.root / "gres.conf").write_text(f"NodeName={names} Name=gpu File={','.join(devices)}\n")
        return _CONF.format(
            host=host,
            controller_port=ports[0],
            root=self.root,
            user=getpass.getuser(),
            extra=self._extra,
            task_plugin=self._task_plugin,
            nodes="\n".join(nodes),
        )

    def _spawn(self, name: str, *command: str, **variables: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Daemons must not outlive a test process that is killed.
                preexec_fn=_die_with_parent,
            )

    def daemon_logs(self, num_lines: int = 8) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted((self.root / "log").glob("*")):
            lines = path.read_text(errors="replace").splitlines()[-num_lines:]
            parts.append("\n".join([f"== {path.name}", *lines]))
        return "\n".join(parts)

    # ---- commands ----------------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, timeout: float = 60.0, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a command that talks to this cluster; a failure raises RuntimeError with its errors."""
        result = self.process(*command, timeout=timeout, cwd=cwd)
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {result.returncode}: {result.stderr}")
        return result.stdout.strip()

    def process(
        self,
        *command: str | Path,
        timeout: float = 60.0,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        user: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command in this cluster's environment, to its end; ``user`` is the numeric id of another user."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment | dict(environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            user=user,
        )

    def pretrain(self, *arguments: Any, cwd: Path | None = None, timeout: float = 300.0, **more: Any) -> Any:
        """``pretrain ARGUMENT...`` as a user of this cluster calls it: a finished process with its output."""
        return self.process(
            sys.executable, "-m", "pretrain.cli", *map(str, arguments), cwd=cwd, timeout=timeout, **more
        )

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def job(self, job: int) -> dict[str, str]:
        """Fields of ``scontrol show job``: JobState, Reason, Restarts, NodeList, ExitCode, ..."""
        text = self.run("scontrol", "-o", "show", "job", str(job))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_job(self, job: int, *states: str, timeout: float = 60.0) -> str:
        """Waits for one of ``states``; fails at once, with the job's fields, when it ended in another one."""
        found: dict[str, str] = {}

        def arrived() -> bool:
            found.update(self.job(job))
            state = found["JobState"]
            if state in FINAL_STATES and state not in states:
                raise AssertionError(f"job {job} ended {state}, expected {'/'.join(states)}: {found}")
            return state in states

        try:
            wait_until(arrived, f"job {job} to be {'/'.join(states)}", timeout, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen {found}") from None
        return found["JobState"]

    def cancel_all(self) -> None:
        """Ends all jobs and waits until every live node is idle again: call it between tests."""
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.run("scancel", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        wait_until(lambda: not self.run("squeue", "-h", "-o", "%A", check=False), "jobs to end", 30)

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo words it (idle, mixed, allocated, down, down*, drained, ...)."""
        text = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False)
        return dict(line.split() for line in text.splitlines() if line)

    def start_node(self, name: str) -> None:
        """Starts the slurmd of ``name``."""
        self._spawn(name, "slurmd", "-D", "-N", name, **{_NODE: name})

    def kill_node(self, name: str, *, tell: bool = True) -> None:
        """The machine dies: SIGKILL to slurmd, its step daemons and all their processes.

        ``tell`` marks the node down in the controller at once, where Slurm itself takes up to half a minute.
        """
        if (daemon := self._processes.pop(name, None)) is not None:
            daemon.kill()
            daemon.wait()
        wait_until(lambda: not self._kill_processes(name), f"the processes of {name} to end", 20, 0.02)
        if tell:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def revive_node(self, name: str) -> None:
        """Starts a killed or drained node again and waits until it is usable."""
        if name not in self._processes or self._processes[name].poll() is not None:
            self.start_node(name)

        def usable() -> bool:
            state = self.node_states().get(name, "")
            if state.startswith(("down", "drain", "fail")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            return state in ("idle", "mixed", "allocated")

        wait_until(usable, f"{name} to be usable", 30)

    def heal(self) -> None:
        """After a test: no jobs, and every node idle again."""
        self.cancel_all()
        for name in self.names:
            self.revive_node(name)
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, "all nodes to be idle", 30)

    def node_processes(self, name: str) -> list[int]:
        """Processes of the jobs' tasks on ``name``: their environment carries Slurm's name of the node."""
        return [pid for pid, environment in self._own_processes() if f"SLURMD_NODENAME={name}".encode() in environment]

    def _kill_processes(self, name: str | None = None) -> bool:
        """SIGKILL to all processes of the cluster, or of one node, and to their children; tells if there were any."""
        marks = {f"SLURMD_NODENAME={name}".encode(), f"{_NODE}={name}".encode()}
        own = {pid for pid, environment in self._own_processes() if name is None or marks & set(environment)}
        # Stopped first, so that they die together: srun's helper would still tell the controller of its death.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in own | _descendants(own):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return bool(own)

    def _own_processes(self) -> Iterator[tuple[int, list[bytes]]]:
        marker = f"SLURM_CONF={self.conf}".encode()
        for pid in _stats():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if marker in environment and pid != os.getpid():
                    yield pid, environment


_NODE = "LAB_NODE"
"""In the environment of a slurmd and of its step daemons, not of tasks."""


def _stats() -> dict[int, int]:
    """Living processes and their parents; a zombie is dead."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry)] = int(parent)
    return parents


def _descendants(pids: set[int]) -> set[int]:
    parents, found = _stats(), set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - pids - {os.getpid()}


def _free_ports(count: int) -> list[int]:
    """Ports below the range that the kernel hands out by itself, free a moment ago."""
    sockets, ports = [], []
    try:
        while len(ports) < count:
            candidate = 20000 + secrets.randbelow(10000)
            holder = socket.socket()
            sockets.append(holder)
            with contextlib.suppress(OSError):
                holder.bind(("0.0.0.0", candidate))
                ports.append(candidate)
    finally:
        for holder in sockets:
            holder.close()
    return ports


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
