"""A small all-reduce over all nodes before the first step of an attempt, which names the node at fault.

One task on each node: it tries the node's devices (where it has any), links up with the next node in a ring, sends it
a block of known content, and takes part in a sum over the ring. What fails is known by node and by link, so that a
node that breaks both of its links is told from its neighbours, where a failed collective of the ranks would only say
that somebody is missing. Torch-free, so that it costs no import: ``pretrain.parallel.device_check`` is started for
devices alone.

This is the supervisor's side; :mod:`launchers.slurm.node_task` is the task.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launchers.lifecycle.attempt import say
from launchers.run_dir import RunDir, atomic_write_text
from launchers.slurm.node_task import DEVICE_TIMEOUT_S, LINK_TIMEOUT_S, PATIENCE_S, VARIABLE

if TYPE_CHECKING:
    from launchers.slurm.start import Allocation
    from pretrain.config.schema import Config


def check_nodes(
    config: Config,
    run: RunDir,
    attempt: int,
    allocation: Allocation,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """The nodes of ``allocation`` that must not take part in an attempt, each with the reason; empty when all may.

    Writes ``node_check.json`` beside the attempt's logs, with the speed of each link. A check that failed as a whole,
    such as srun refusing to start anything, blames nobody: the start of the ranks will tell. Neither does one that
    ``stopped`` cut short, for a run that is to stop must not wait for a slow node. Raises AllocationError
    when the batch host has no address for the others, SlurmError when Slurm does not answer.
    """
    from launchers.slurm.commands import Slurm
    from launchers.slurm.nodes import named_in, run_on_nodes, unusable
    from launchers.slurm.start import interface_address, node_address

    began = time.monotonic()
    down = unusable(allocation.nodes)
    alive = [name for name in allocation.nodes if name not in down]
    reports: dict[str, dict[str, Any]] = {}
    error, named, devices = "", list[str](), _expected_devices(config)
    if alive:
        interface = config.cluster.network_interface
        infos = Slurm().nodes({*alive, allocation.host})
        addresses = {name: info.address for name, info in infos.items()}
        table = {name: None if interface else node_address(name, addresses) for name in alive}
        own = interface_address(interface) if interface else node_address(allocation.host, addresses)
        # A cold file system may keep an interpreter for minutes: that is slow, not broken, up to what a start may take.
        start_s = config.lifecycle.startup_timeout_s
        limit = start_s + 2 * LINK_TIMEOUT_S + (DEVICE_TIMEOUT_S if devices else 0.0)
        with Registry(own, alive, min(PATIENCE_S, start_s)) as registry:
            part = {"nodes": table, "interface": interface, "devices": devices, "registry": registry.address}
            result = run_on_nodes(
                allocation.job,
                alive,
                [*_container(config), config.cluster.rank_python or sys.executable, "-m", "launchers.slurm.node_task"],
                timeout_s=limit,
                environment={VARIABLE: json.dumps(part)},
                options=[each for each in config.cluster.srun_options if OF_CONTAINERS.match(each)],
                stopped=stopped,
            )
        for text in result.output.values():
            reports |= {report["node"]: report for report in _reports(text)}
        error, named = result.error, named_in(result.error, alive)
    for name, report in reports.items():
        if report.get("late_s"):
            say(f"node {name} came to the node check {report['late_s']:.0f} s late: slow to start, its links not tried")
    faults = {} if stopped() else down | judge(alive, reports, named, allocation.host)
    record = {
        "seconds": round(time.monotonic() - began, 3),
        "faults": faults,
        "mb_per_s": {f"{name} -> {r['next']}": r["mb_per_s"] for name, r in reports.items() if "mb_per_s" in r},
        "reports": reports,
        "srun": error,
    }
    atomic_write_text(run.attempt_path(attempt) / "node_check.json", json.dumps(record, indent=1) + "\n")
    return faults


def judge(
    nodes: Sequence[str], reports: Mapping[str, Mapping[str, Any]], named: Sequence[str] = (), host: str = ""
) -> dict[str, str]:
    """Nodes at fault and why, from what each reported (see :mod:`launchers.slurm.node_task`).

    A node that is silent while others speak, or whose device fails, is at fault. A broken link counts against both its
    nodes: the one with the most of them is at fault, and of equals the one that comes later and is not the batch host
    ``host``, which has kept in touch. So one of two nodes that cannot talk leaves, rightly or not, and the next attempt
    has another pair.
    """
    faults = dict.fromkeys(named, "Slurm could not start a process there")
    for name in nodes:
        report = reports.get(name)
        if report is None:
            if reports:
                faults.setdefault(name, "it did not answer the check while other nodes did")
        elif fault := report.get("device_fault"):
            faults[name] = f"its devices: {fault}"
        elif fault := report.get("own_fault"):
            faults[name] = str(fault)
    while broken := [
        (name, str(report["next"]), str(report["link_fault"]))
        for name, report in reports.items()
        if report.get("link_fault") and name not in faults and report["next"] not in faults
    ]:
        counts = Counter(name for first, second, _ in broken for name in (first, second))
        worst = max(counts, key=lambda name: (counts[name], name != host, list(nodes).index(name)))
        reasons = [f"{first} -> {second}: {fault}" for first, second, fault in broken if worst in (first, second)]
        faults[worst] = f"link {'; '.join(reasons)}"
    return faults


class Registry:
    """Where tasks tell their addresses and learn the others': a small server of the supervisor.

    Answers when all of ``names`` have told theirs, or ``patience_s`` after the first did, with those that have. Who
    comes later is told so and gets no neighbours: it has come, which is all that can still be said of it.
    """

    def __init__(self, address: str, names: Sequence[str], patience_s: float) -> None:
        self._names = list(names)
        self._patience_s = patience_s
        self._closed = threading.Event()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=max(16, len(self._names)))
        self.address: tuple[str, int] = (address, int(self._server.getsockname()[1]))
        self._thread = threading.Thread(target=self._serve, name="node-check-registry", daemon=True)

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _serve(self) -> None:
        told: dict[str, tuple[str, int]] = {}
        waiting: list[socket.socket] = []
        answer_at: float | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._server)
            self._server.settimeout(0.2)
            while not self._closed.is_set():
                if (came := self._accept(stack)) is not None:
                    name, address, port, link = came
                    if answer_at is not None and not waiting:
                        late_s = max(0.001, time.monotonic() - answer_at)
                        _answer(link, [(name, address, port)], late_s)
                        continue
                    answer_at = answer_at if answer_at is not None else time.monotonic() + self._patience_s
                    told[name] = (address, port)
                    waiting.append(link)
                is_time = len(told) >= len(self._names) or (answer_at is not None and time.monotonic() > answer_at)
                if waiting and is_time:
                    answer_at = time.monotonic()
                    ring = [(name, *told[name]) for name in self._names if name in told]
                    for link in waiting:
                        _answer(link, ring, 0.0)
                    waiting = []

    def _accept(self, stack: contextlib.ExitStack) -> tuple[str, str, int, socket.socket] | None:
        """The next node that tells its address; None: nobody just now, or a stranger."""
        try:
            link = stack.enter_context(self._server.accept()[0])
            link.settimeout(5.0)
            found = json.loads(link.makefile("r", encoding="utf-8").readline(_LONGEST_LINE))
            name, address, port = str(found["node"]), str(found["address"]), int(found["port"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (name, address, port, link) if name in self._names else None


_LONGEST_LINE = 4096


def _answer(link: socket.socket, ring: Sequence[tuple[str, str, int]], late_s: float) -> None:
    with contextlib.suppress(OSError):
        link.sendall(json.dumps({"ring": ring, "late_s": round(late_s, 3)}).encode() + b"\n")


def _expected_devices(config: Config) -> int:
    """Devices that each node must have: one for each rank where they are asked for, 0 where the CPU will do."""
    launcher = config.launcher
    per_node = getattr(launcher, "processes_per_node", 1)
    return per_node if launcher.device == "cuda" else -per_node if launcher.device == "auto" else 0


OF_CONTAINERS = re.compile(r"--((no-)?container|environment\b)")
"""Options of Pyxis and the like. Others share out a node's devices and memory, of which the check's one task on each
node is to see all."""


def _container(config: Config) -> list[str]:
    return shlex.split(config.cluster.container) if config.cluster.container else []


def _reports(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "node" in found:
                yield found
