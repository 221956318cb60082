"""What Slurm's tables say against a request; the tables here are made up, the real cluster is in tests/slurm."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.slurm.commands import NodeInfo, PartitionInfo
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.planning.preflight import cluster as concern
from pretrain.planning.preflight.cluster_facts import (
    ClusterFacts,
    gres_counts,
    memory_mb,
    node_memory_mb,
    wanted_gres,
)
from pretrain.planning.preflight.findings import Finding, Level

NAMES = ("a1", "a2", "a3", "a4")


def _node(name: str, *states: str, **more: Any) -> NodeInfo:
    facts = {"cpus": 64, "memory_mb": 512_000, "gres": "gpu:h100:8(S:0-1)", "reason": ""}
    return NodeInfo(name=name, states=frozenset(states or ("IDLE",)), address=name, host_name=name, **{**facts, **more})


def _facts(*, nodes: tuple[NodeInfo, ...] = (), associations: Any = None, **partition: Any) -> ClusterFacts:
    defaults: dict[str, Any] = {
        "name": "main",
        "state": "UP",
        "is_default": True,
        "nodes": NAMES,
        "max_time_s": 86400.0,
        "max_nodes": None,
        "max_cpus_per_node": None,
        "allowed_groups": None,
        "allowed_accounts": None,
        "allowed_qos": None,
    }
    info = PartitionInfo(**{**defaults, **partition})
    found = {node.name: node for node in (*map(_node, NAMES), *nodes)}
    return ClusterFacts({info.name: info}, found, associations)


def _judge(facts: ClusterFacts, launcher: SlurmConfig | None = None, **site: Any) -> list[Finding]:
    launcher = launcher or SlurmConfig(num_processes=16, num_nodes=2)
    return list(concern.judge(facts, ClusterConfig(**site), launcher))


def test_what_fits() -> None:
    found = _judge(_facts(), gres="gpu:{processes_per_node}", memory_per_node="400G")
    assert {finding.level for finding in found} == {Level.OK}


@pytest.mark.parametrize(
    ("facts", "site", "launcher", "what", "words"),
    [
        ({"is_default": False}, {}, {}, "cluster.partition", "there are main"),
        ({}, {"partition": "mian"}, {}, "cluster.partition", "did you mean cluster.partition=main"),
        ({"state": "DOWN"}, {}, {}, "partition main", "choose another"),
        ({}, {}, {"time_limit": "2-00:00:00"}, "launcher.time_limit", '"1-00:00:00"'),
        ({"max_nodes": 1}, {}, {}, "launcher.num_nodes", "num_nodes=1"),
        ({"max_cpus_per_node": 31}, {}, {"threads_per_process": 4}, "launcher.threads_per_process", "process=3,"),
        ({}, {}, {"num_nodes": 8}, "launcher.num_nodes", "num_nodes=4"),
        ({}, {"exclude": ["a1", "a2", "a3"]}, {}, "launcher.num_nodes", "num_nodes=1"),
        ({}, {}, {"threads_per_process": 16}, "launcher.num_processes", "ask for less"),
        ({}, {"memory_per_node": "600G"}, {}, "cluster.memory_per_node", "ask for less"),
        ({}, {"memory_per_node": "lots"}, {}, "cluster.memory_per_node", "64G"),
        ({}, {"gres": "gpu:a100:8"}, {}, "cluster.gres", "ask for less"),
        ({}, {"gres": "gpu:{ranks}"}, {}, "cluster.gres", "correct"),
        ({"allowed_groups": ("nobody-here",)}, {}, {}, "partition main", "ask the site"),
        ({"allowed_accounts": ("physics",)}, {"account": "arts"}, {}, "cluster.account", "account=physics"),
        ({"associations": [("physics", "", ("long",))]}, {"account": "arts"}, {}, "cluster.account", "physics"),
        ({"associations": [("physics", "", ("long",))]}, {"qos": "short"}, {}, "cluster.qos", "long"),
    ],
)
def test_what_does_not(
    facts: dict[str, Any], site: dict[str, Any], launcher: dict[str, Any], what: str, words: str
) -> None:
    settings = SlurmConfig(**{"num_processes": 16, "num_nodes": 2, **launcher})
    faults = [finding for finding in _judge(_facts(**facts), settings, **site) if finding.level is Level.ERROR]
    assert [fault.what for fault in faults] == [what]
    assert words in faults[0].fix


def test_all_faults_are_told_at_once() -> None:
    settings = SlurmConfig(num_processes=16, num_nodes=2, time_limit="9-00:00:00", threads_per_process=99)
    found = _judge(_facts(state="DRAIN"), settings, memory_per_node="900G", gres="gpu:99")
    assert sum(finding.level is Level.ERROR for finding in found) == 5


def test_no_node_has_it_all() -> None:
    small = _node("a1", memory_mb=1000), _node("a2", memory_mb=1000)
    bare = _node("a3", gres=""), _node("a4", gres="")
    found = _judge(_facts(nodes=(*small, *bare)), gres="gpu:8", memory_per_node="100G")
    assert [finding.what for finding in found if finding.level is Level.ERROR] == ["launcher.num_nodes"]


def test_nodes_out_of_service_make_the_job_wait() -> None:
    down = [_node(name, "DOWN", reason="power") for name in NAMES[:3]]
    (found,) = (finding for finding in _judge(_facts(nodes=tuple(down))) if finding.what == "nodes")
    assert found.level is Level.WARNING
    assert "a1 DOWN (power)" in found.found
    assert "launcher.num_nodes=1" in found.fix


def test_notations_of_slurm() -> None:
    assert [memory_mb(text) for text in ("64000", "64G", "1T", "512K", "0", None, "many")] == [
        64000, 64 * 1024, 1024 * 1024, 0.5, 0, None, None,
    ]  # fmt: skip
    assert gres_counts("gpu:h100:4(S:0-1),gpu:a100:2,nvme") == {"gpu": 6, "gpu:h100": 4, "gpu:a100": 2, "nvme": 1}
    launcher = SlurmConfig(num_processes=8, num_nodes=2)
    assert wanted_gres(ClusterConfig(gres="gpu:h100:{processes_per_node}"), launcher) == {"gpu:h100": 4}
    assert wanted_gres(ClusterConfig(gres=None), launcher) == {}


@pytest.mark.parametrize(
    ("asked", "settings", "expected"),
    [
        ("100G", {}, 100 * 1024),
        ("0", {"DefMemPerNode": "8000"}, 512_000),
        (None, {"DefMemPerNode": "8000"}, 8000),
        (None, {"DefMemPerCPU": "1000", "DefMemPerNode": "UNLIMITED"}, 8 * 2 * 1000),
        (None, {}, 512_000),
    ],
)
def test_memory_of_a_node(asked: str | None, settings: dict[str, str], expected: float) -> None:
    facts = ClusterFacts(_facts().partitions, _facts().nodes, None, settings)
    launcher = SlurmConfig(num_processes=16, num_nodes=2, threads_per_process=2)
    found = node_memory_mb(facts, ClusterConfig(memory_per_node=asked), launcher)
    assert found is not None
    assert found[0] == expected
