"""Who is at fault when nodes cannot talk, and one node's task with real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm.node_check import OF_CONTAINERS, Registry, judge
from launchers.slurm.node_task import VARIABLE
from launchers.slurm.nodes import run_on_nodes

NODES = ["a", "b", "c", "d"]


def reports(**faults: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ring = {name: NODES[(i + 1) % 4] for i, name in enumerate(NODES)}
    return {name: {"node": name, "next": ring[name], **faults.get(name, {})} for name in NODES}


def test_healthy_nodes_are_not_blamed() -> None:
    assert judge(NODES, reports()) == {}


def test_silent_node_and_faulty_device_are_named() -> None:
    found = reports(b={"device_fault": "cuda:1: uncorrectable ECC error"})
    del found["d"]
    assert judge(NODES, found) == {
        "b": "its devices: cuda:1: uncorrectable ECC error",
        "d": "it did not answer the check while other nodes did",
    }


def test_node_that_breaks_both_its_links_is_told_from_its_neighbours() -> None:
    found = reports(b={"link_fault": "timed out"}, c={"link_fault": "timed out"})
    assert list(judge(NODES, found)) == ["c"]


def test_of_two_nodes_the_batch_host_stays() -> None:
    for host, blamed in (("a", "b"), ("b", "a")):
        found = {"a": {"next": "b", "link_fault": "refused"}, "b": {"next": "a"}}
        assert list(judge(["a", "b"], found, host=host)) == [blamed]


def test_two_separate_faults_are_both_named() -> None:
    found = reports(a={"link_fault": "x"}, b={"link_fault": "x"}, d={"own_fault": "no interface ib0"})
    assert set(judge(NODES, found)) == {"b", "d"}


def test_check_that_did_not_run_blames_nobody() -> None:
    assert judge(NODES, {}) == {}


def run_tasks(names: list[str], registry: Registry, addresses: dict[str, str], **part: Any) -> list[dict[str, Any]]:
    whole = {"nodes": addresses, "interface": None, "devices": 0, "registry": registry.address, **part}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launchers.slurm.node_task"],
            env=os.environ | {VARIABLE: json.dumps(whole), "SLURMD_NODENAME": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    return [json.loads(process.communicate(timeout=60)[0]) for process in processes]


def test_tasks_send_and_add_up_round_the_ring() -> None:
    names = ["a", "b", "c"]
    with Registry("127.0.0.1", names, 30.0) as registry:
        found = run_tasks(names, registry, dict.fromkeys(names, "127.0.0.1"))
    assert [report["next"] for report in found] == ["b", "c", "a"]
    assert all(
        report["mb_per_s"] > 0 and not {"link_fault", "own_fault", "sum_fault"} & report.keys() for report in found
    )


def test_node_that_never_comes_does_not_hold_the_others_up() -> None:
    names = ["a", "b", "gone"]
    with Registry("127.0.0.1", names, 3.0) as registry:
        found = run_tasks(names[:2], registry, dict.fromkeys(names, "127.0.0.1"))
    by_name = {report["node"]: report for report in found}
    assert [report["next"] for report in found] == ["b", "a"]
    assert list(judge(names, by_name, host="a")) == ["gone"]


def test_node_that_cannot_reach_the_batch_host_says_so() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with Registry("127.0.0.1", ["a"], 0.0) as registry:
            registry.address = closed.getsockname()
            (report,) = run_tasks(["a"], registry, {"a": "127.0.0.1"})
    assert "cannot be reached" in report["own_fault"]


def told(registry: Registry, line: str) -> Any:
    """What the registry answers to one line."""
    with socket.create_connection(registry.address, timeout=30) as link:
        link.sendall(line.encode() + b"\n")
        return json.loads(link.makefile("r").readline() or "null")


def test_node_that_comes_late_is_well_and_not_at_fault() -> None:
    names = ["a", "b", "late"]
    with Registry("127.0.0.1", names, 0.5) as registry:
        # Returns when the two have been answered, without the third.
        found = run_tasks(names[:2], registry, dict.fromkeys(names, "127.0.0.1"))
        found += run_tasks(names[2:], registry, dict.fromkeys(names, "127.0.0.1"))
    by_name = {report["node"]: report for report in found}
    assert by_name["late"]["late_s"] > 0
    assert judge(names, by_name, host="a") == {}


@pytest.mark.parametrize("line", ["[]", "7", "null", "GET / HTTP/1.1", '{"node": []}', '{"node": "a"}'])
def test_stranger_does_not_end_the_registry(line: str) -> None:
    with Registry("127.0.0.1", ["a"], 30.0) as registry:
        with socket.create_connection(registry.address, timeout=30) as stranger:
            stranger.sendall(line.encode() + b"\n")
        answer = told(registry, '{"node": "a", "address": "127.0.0.1", "port": 9}')
    assert answer == {"ring": [["a", "127.0.0.1", 9]], "late_s": 0.0}


def test_check_does_not_keep_a_run_that_is_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho '0: here'\nexec sleep 600\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = run_on_nodes(7, ["a", "b"], ["true"], timeout_s=500.0, stopped=lambda: True)
    assert (result.output, result.silent, result.timed_out) == ({"a": "here\n"}, ("b",), True)


def test_check_runs_in_the_container_but_sees_the_whole_node() -> None:
    """Its one task on each node must not be given the share of one rank."""
    of_containers = ["--container-image=site/pretrain:1", "--no-container-mount-home", "--environment=site"]
    of_ranks = ["--gpus-per-task=1", "--gpu-bind=single:1", "--mem-per-cpu=2G", "--cpu-bind=cores", "--mpi=pmix"]
    assert [each for each in of_containers + of_ranks if OF_CONTAINERS.match(each)] == of_containers


@pytest.mark.parametrize("interface", ["nosuch0"])
def test_interface_that_a_node_lacks_is_its_fault(interface: str) -> None:
    with Registry("127.0.0.1", ["a"], 0.0) as registry:
        (report,) = run_tasks(["a"], registry, {"a": "127.0.0.1"}, interface=interface)
    assert "nosuch0" in report["own_fault"]
    assert "lo" in report["own_fault"]
