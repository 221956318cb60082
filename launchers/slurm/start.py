"""Starting the ranks of an attempt inside a Slurm job: one ``srun`` for the whole step.

Every rank gets what the process contract asks for: Slurm's own variables for its place, and from here the address of
rank 0's node, a port that is free there, the number of its threads and the attempt.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.run_dir import RunDir, atomic_write_text
from launchers.slurm.commands import Slurm, SlurmError
from launchers.slurm.script import rank_variables
from launchers.slurm.step import AGENT_LOG
from pretrain.config.launch_schema import SlurmConfig

if TYPE_CHECKING:
    from pretrain.config.schema import Config

STEP_NAME = "attempt_{attempt:04d}"
"""Name of an attempt's step: ``Slurm().step(job, name)`` finds it for signals."""

_RECORDED = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "FI_", "UCX_", "OMP_", "MASTER_", "PYTORCH_")
# What the batch step told about itself; options of srun that must come from the command line alone.
_DROPPED = (
    "SLURM_CPU_BIND",
    "SLURM_DISTRIBUTION",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_EXACT",
)


class AllocationError(ValueError):
    """This process is in no Slurm job, or the allocation does not fit the run."""


@dataclass(frozen=True)
class Allocation:
    """What a Slurm job was given. ``nodes`` are in Slurm's order, which is that of ranks.

    ``host`` is Slurm's name of the node that this process runs on (the batch host). ``restarts`` counts how often the
    job was queued again. ``cpus`` are those of each node in ``nodes``.
    """

    job: int
    nodes: tuple[str, ...]
    cpus: tuple[int, ...]
    host: str
    restarts: int = 0

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None, slurm: Slurm | None = None) -> Allocation:
        """From the job's variables. Raises AllocationError that names every missing one."""
        env = os.environ if env is None else env
        names = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE", "SLURMD_NODENAME")
        if missing := [name for name in names if not env.get(name)]:
            raise AllocationError(
                f"this process is in no Slurm job: {', '.join(missing)} not set; submit with `pretrain run ... "
                "launcher=slurm`"
            )
        nodes = (slurm or Slurm(env)).expand(env["SLURM_JOB_NODELIST"])
        cpus = _expanded_counts(env["SLURM_JOB_CPUS_PER_NODE"])
        if len(cpus) != len(nodes):
            raise AllocationError(
                f"SLURM_JOB_CPUS_PER_NODE is {env['SLURM_JOB_CPUS_PER_NODE']!r}, expected counts for the {len(nodes)} "
                f"nodes of SLURM_JOB_NODELIST={env['SLURM_JOB_NODELIST']!r}"
            )
        restarts = env.get("SLURM_RESTART_COUNT", "0")
        return cls(
            job=int(env["SLURM_JOB_ID"]),
            nodes=nodes,
            cpus=cpus,
            host=env["SLURMD_NODENAME"],
            restarts=int(restarts) if restarts.isdigit() else 0,
        )

    def without(self, nodes: Iterable[str]) -> Allocation:
        """The same allocation with nodes left out, such as one that has died."""
        left_out = set(nodes)
        kept = [i for i, name in enumerate(self.nodes) if name not in left_out]
        return replace(self, nodes=tuple(self.nodes[i] for i in kept), cpus=tuple(self.cpus[i] for i in kept))

    def first(self, count: int) -> Allocation:
        """Its first ``count`` nodes."""
        return replace(self, nodes=self.nodes[:count], cpus=self.cpus[:count])


def _expanded_counts(text: str) -> tuple[int, ...]:
    """``8(x2),4`` -> 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return ()
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def rank_command(
    config: Config, run: RunDir, attempt: int, allocation: Allocation, program: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Command and environment that start all ranks of ``attempt`` on the first ``launcher.num_nodes`` nodes.

    The process that runs the command must have called this: it holds rank 0's port until the next call. Writes
    ``start.json`` beside the attempt's logs: command, nodes, address, and the settings that reach NCCL and gloo.

    Args:
        config: with the attempt's ``launcher.num_nodes`` and ``num_processes`` (an elastic run has revisions of them).
        program: interpreter, module and arguments of a rank; ``cluster.container`` is put before it.

    Raises:
        AllocationError: too few nodes, or no address of rank 0 that other nodes can reach.
    """
    launcher = config.launcher
    assert isinstance(launcher, SlurmConfig)
    if len(allocation.nodes) < launcher.num_nodes:
        raise AllocationError(
            f"job {allocation.job} has {len(allocation.nodes)} usable nodes ({', '.join(allocation.nodes) or 'none'}), "
            f"launcher.num_nodes asks for {launcher.num_nodes}"
        )
    used = allocation.first(launcher.num_nodes)
    per_node = launcher.processes_per_node
    threads = launcher.threads_per_process or max(1, min(used.cpus) // per_node)
    address, port = _rendezvous(config, used)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
    # A template may have set them otherwise: what the script says, holds.
    environment |= {name: value for name, value in rank_variables(config).items() if name not in environment}
    environment |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "PRETRAIN_ATTEMPT": str(attempt),
        "PYTHONUNBUFFERED": "1",
    }
    container = shlex.split(config.cluster.container) if config.cluster.container else []
    ranks = list(program)
    tasks, cpus = per_node, threads
    log = run.attempt_path(attempt) / "rank_%5t.log"
    if launcher.start == "torchrun":
        from launchers.slurm.torchrun import node_command

        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(launcher.shutdown_grace_s))
        ranks = node_command(ranks, num_nodes=len(used.nodes), per_node=per_node, logs=run.attempt_path(attempt))
        tasks, cpus = 1, threads * per_node
        log = run.attempt_path(attempt) / AGENT_LOG.format(node="%5n")
    # No node may be asked for more than the job has there, whatever threads were wished for.
    cpus = max(1, min(cpus, min(used.cpus) // tasks))
    run.attempt_path(attempt).mkdir(parents=True, exist_ok=True)
    command = [
        "srun",
        f"--job-name={STEP_NAME.format(attempt=attempt)}",
        f"--nodes={len(used.nodes)}",
        f"--nodelist={','.join(used.nodes)}",
        f"--ntasks={len(used.nodes) * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",  # up to 23.02 srun does not take it from the job
        "--distribution=block",
        *_cpu_binding(),
        "--overlap",  # a step of a dead attempt that cannot be ended must not keep the next one waiting
        "--no-kill",
        "--kill-on-bad-exit=0",  # the supervisor lets the other ranks save
        "--wait=0",
        "--mpi=none",
        "--unbuffered",
        "--export=ALL",
        "--input=none",
        f"--output={log}",
        "--open-mode=append",
        *config.cluster.srun_options,
        *container,
        *ranks,
    ]
    _record(run, attempt, used, command, environment)
    return command, environment


def _cpu_binding() -> list[str]:
    """Each rank on cores of its own, at sites whose Slurm can bind; others would complain in the job's log."""
    try:
        plugins = Slurm().config().get("TaskPlugin", "")
    except SlurmError:
        plugins = ""  # a controller that does not answer: binding is no reason to wait
    return ["--cpu-bind=cores"] if re.search(r"affinity|cgroup", plugins) else []


def _record(run: RunDir, attempt: int, used: Allocation, command: list[str], environment: dict[str, str]) -> None:
    settings = {name: value for name, value in sorted(environment.items()) if name.startswith(_RECORDED)}
    facts = {
        "job": used.job,
        "nodes": used.nodes,
        "batch_host": used.host,
        "address": environment["MASTER_ADDR"],
        "port": int(environment["MASTER_PORT"]),
        "command": command,
        "environment": settings,
    }
    atomic_write_text(run.attempt_path(attempt) / "start.json", json.dumps(facts, indent=1) + "\n")


# ---- address and port of rank 0 -----------------------------------------------------------------------------------

_held_port: socket.socket | None = None


def _rendezvous(config: Config, used: Allocation) -> tuple[str, int]:
    """Address of rank 0's node that all ranks can reach, and a port that is free there."""
    node, interface = used.nodes[0], config.cluster.network_interface
    here = node == used.host
    if here:
        address = interface_address(interface) if interface else None
        port = _hold_port()
    else:
        # The batch host takes no part, as when it was left out: the node itself is asked.
        found = _ask(config, used, node, interface)
        address, port = found.get("address"), int(found["port"])
    if address is None:
        infos = Slurm().nodes(used.nodes)
        if missing := [name for name in used.nodes if name not in infos]:
            raise AllocationError(
                f"Slurm knows no node {', '.join(missing)} of job {used.job}; see `scontrol show node`"
            )
        address = node_address(node, {name: info.address for name, info in infos.items()})
    return address, port


def node_address(node: str, addresses: Mapping[str, str], resolve: Any = None) -> str:
    """Address of ``node`` for the other nodes, from Slurm's NodeAddr of all nodes of the attempt.

    A name is resolved here. A loopback address serves only when all nodes have one, which is several slurmd on one
    machine; anywhere else it would make each node wait for itself. Raises AllocationError with the way out.
    """
    found = {name: _resolved(address, resolve or _lookup) for name, address in addresses.items()}
    own = found[node]
    way = "set cluster.network_interface to the interface that joins the nodes, such as ib0"
    if own is None:
        raise AllocationError(
            f"node {node}: its address {addresses[node]!r} (NodeAddr) resolves to no IP address here, so other nodes "
            f"could not reach rank 0; {way}"
        )
    if ipaddress.ip_address(own).is_loopback and len(addresses) > 1:
        others = [name for name, ip in found.items() if ip is None or not ipaddress.ip_address(ip).is_loopback]
        # The nodes of one machine may also share one address.
        if others:
            raise AllocationError(
                f"node {node}: its address {addresses[node]!r} (NodeAddr) resolves to {own}, which is this machine for "
                f"each of {', '.join(addresses)}; {way}"
            )
    return own


def _resolved(address: str, resolve: Any) -> str | None:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return resolve(address)


def _lookup(name: str) -> str | None:
    """The first address of a name; one that is not loopback where there is one (Debian lists 127.0.1.1 first)."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return None
    return next((ip for ip in found if not ipaddress.ip_address(ip).is_loopback), found[0] if found else None)


def interface_address(interface: str) -> str:
    """This machine's address on a network interface, IPv4 first. Raises AllocationError that lists the interfaces."""
    import psutil

    interfaces = psutil.net_if_addrs()
    found = interfaces.get(interface, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found:
            if entry.family == family:
                return str(entry.address).partition("%")[0]
    raise AllocationError(
        f"cluster.network_interface: {interface!r} has no address on {socket.gethostname()}; there are "
        f"{', '.join(sorted(interfaces))}"
    )


def _hold_port() -> int:
    """A free TCP port of this machine, kept from other programs until the next call or this process's end.

    Bound but not listening: the rendezvous store binds with SO_REUSEADDR as well, which Linux allows beside it.
    """
    global _held_port
    if _held_port is not None:
        _held_port.close()
    _held_port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    _held_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _held_port.bind(("", 0))
    return int(_held_port.getsockname()[1])


def _ask(config: Config, used: Allocation, node: str, interface: str | None) -> dict[str, Any]:
    from launchers.slurm.nodes import run_on_nodes

    python = config.cluster.python or sys.executable
    words = [python, "-m", "launchers.slurm.nodes", *([f"--interface={interface}"] if interface else [])]
    result = run_on_nodes(used.job, [node], words, timeout_s=120.0)
    text = result.output.get(node, "").strip()
    try:
        return dict(json.loads(text.splitlines()[-1]))
    except (ValueError, IndexError) as error:
        raise AllocationError(
            f"node {node} did not tell a free port: {text or result.error or 'it said nothing'}"
        ) from error


def step_is_gone(slurm: Slurm, job: int, attempt: int) -> bool:
    """Whether the step of an attempt has left the controller's list. True when Slurm has forgotten the job."""
    try:
        return slurm.step(job, STEP_NAME.format(attempt=attempt)) is None
    except SlurmError as error:
        if error.transient:
            raise
        return True


def start_record(run: RunDir, attempt: int) -> dict[str, Any] | None:
    """What :func:`rank_command` recorded of an attempt; None without a record."""
    path: Path = run.attempt_path(attempt) / "start.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
