"""Running a small program once on each node of a job, and what Slurm says of nodes.

As a program, ``python -m launchers.slurm.nodes [--interface=NAME]`` prints a free port of this node, and its address on
a network interface, as one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from launchers.slurm.commands import Slurm, SlurmError, SlurmMissingError

_LAUNCH_FAILED = re.compile(r"(?:failed on node|[Nn]ode failure on|on node) ([A-Za-z0-9._-]+)")


@dataclass(frozen=True)
class NodeRun:
    """What the tasks printed, by node; nodes that never answered; srun's own messages."""

    output: dict[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    error: str = ""
    timed_out: bool = False


def run_on_nodes(
    job: int,
    nodes: Sequence[str],
    words: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    stopped: Callable[[], bool] | None = None,
) -> NodeRun:
    """Runs ``words`` once on each of ``nodes`` inside ``job`` and collects what they print, by node.

    ``nodes`` are in the job's order. Tasks still running after ``timeout_s`` are ended; a node without a line of output
    is silent. ``options`` are further ones of srun. ``stopped`` is asked about once a second; when it says so the tasks
    are ended early, as after ``timeout_s``. Raises SlurmMissingError.
    """
    command = [
        "srun",
        f"--jobid={job}",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--overlap",
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--mpi=none",
        "--export=ALL",
        "--input=none",
        *options,
        "--label",  # every line begins with its task, and tasks are numbered in the order of the job's nodes
        *words,
    ]
    dropped = ("SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION")
    base = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    timed_out = False
    try:
        process = subprocess.Popen(
            command,
            env=base | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise SlurmMissingError("srun: no such command on this node; Slurm's commands must be on PATH there") from error
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            said, complaints = process.communicate(timeout=max(0.0, min(1.0, left_s)))
            break
        except subprocess.TimeoutExpired:
            if left_s > 0 and not (stopped is not None and stopped()):
                continue
            timed_out = True
            said, complaints = _end(process)
            break
    output: dict[str, str] = {}
    for line in said.splitlines():
        number, sign, text = line.partition(": ")
        if sign and number.strip().isdigit() and int(number) < len(nodes):
            name = nodes[int(number)]
            output[name] = output.get(name, "") + text + "\n"
    return NodeRun(output, tuple(name for name in nodes if name not in output), complaints.strip(), timed_out)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ends srun and its tasks (SIGTERM to srun kills them); what they had printed."""
    process.terminate()
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)
        return "", "srun could not be ended"


def named_in(message: str, nodes: Iterable[str]) -> list[str]:
    """Nodes that srun's messages blame (``Task launch ... failed on node node2: ...``)."""
    known = set(nodes)
    return list(dict.fromkeys(name for name in _LAUNCH_FAILED.findall(message) if name in known))


def unusable(nodes: Sequence[str], slurm: Slurm | None = None) -> dict[str, str]:
    """Nodes that Slurm holds for down, drained or silent, with its reason. Empty while the controller is silent."""
    try:
        infos = (slurm or Slurm()).nodes(nodes)
    except SlurmError:
        return {}
    gone = {name: "Slurm knows no such node any more" for name in nodes if name not in infos}
    return gone | {
        info.name: f"Slurm has it as {info.state}" + (f" ({info.reason})" if info.reason else "")
        for info in infos.values()
        if not info.is_usable
    }


_DEAD = frozenset(["DOWN", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "FAIL", "INVAL"])


def dead_nodes(nodes: Sequence[str], slurm: Slurm) -> list[str]:
    """Nodes that Slurm holds for dead; a drained one still runs its jobs. Raises SlurmError when it does not answer."""
    infos = slurm.nodes(nodes)
    return [name for name in nodes if name not in infos or infos[name].states & _DEAD]


def main() -> int:
    parser = argparse.ArgumentParser(prog="launchers.slurm.nodes")
    parser.add_argument("--interface")
    interface = parser.parse_args().interface
    from launchers.slurm.start import interface_address

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    print(json.dumps({"port": port, "address": interface_address(interface) if interface else None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
