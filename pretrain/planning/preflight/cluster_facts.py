"""What Slurm says of the cluster, asked once for all concerns; and Slurm's notations. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launchers.slurm.commands import NodeInfo, PartitionInfo, Slurm
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig

ASK_S = 20.0
"""Seconds that one command of Slurm may take in a preflight."""
_MB = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


@dataclass(frozen=True)
class ClusterFacts:
    """Partitions and nodes by name, and what this user's account may use (None: there is no accounting to ask)."""

    partitions: Mapping[str, PartitionInfo]
    nodes: Mapping[str, NodeInfo]
    associations: list[tuple[str, str, tuple[str, ...]]] | None = None
    config: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, slurm: Slurm | None = None) -> ClusterFacts:
        """Ask. Raises :class:`launchers.slurm.commands.SlurmError`."""
        slurm = slurm or Slurm(timeout_s=ASK_S)
        config = slurm.config()
        # Without accounting the command for associations would wait for a server that is not there.
        has_accounting = "none" not in config.get("AccountingStorageType", "none")
        return cls(slurm.partitions(), slurm.nodes(), slurm.associations() if has_accounting else None, config)

    def chosen(self, cluster: ClusterConfig) -> list[PartitionInfo]:
        """The partitions that a job would go to, as far as they exist; several may be named."""
        if cluster.partition is None:
            return [partition for partition in self.partitions.values() if partition.is_default]
        names = [name.strip() for name in cluster.partition.split(",")]
        return [self.partitions[name] for name in names if name in self.partitions]

    def nodes_of(self, cluster: ClusterConfig) -> list[NodeInfo]:
        """Nodes of those partitions that the site does not exclude, fit or not."""
        excluded = set(cluster.exclude)
        names = dict.fromkeys(name for partition in self.chosen(cluster) for name in partition.nodes)
        return [self.nodes[name] for name in names if name in self.nodes and name not in excluded]


def memory_mb(text: str | None) -> float | None:
    """MB of Slurm's notation (``64G``, ``64000``); None for none, and for text that is no such number."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", (text or "").strip().upper())
    return float(match.group(1)) * _MB[match.group(2)] if match else None


def gres_counts(text: str | None) -> dict[str, int]:
    """Counts by name of ``gpu:a100:4(S:0-1),nvme:1``: for each name in all, and for each ``name:type``."""
    counts: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text or "").split(","):
        fields = item.strip().removeprefix("gres/").replace("=", ":").split(":")
        if not fields[0]:
            continue
        count = int(fields.pop()) if len(fields) > 1 and fields[-1].isdigit() else 1
        for key in {fields[0], ":".join(fields)}:
            counts[key] = counts.get(key, 0) + count
    return counts


def wanted_gres(cluster: ClusterConfig, launcher: SlurmConfig) -> dict[str, int]:
    """What each node must offer. Raises ValueError when ``cluster.gres`` names something unknown."""
    try:
        text = (cluster.gres or "").format(processes_per_node=launcher.processes_per_node)
    except (KeyError, IndexError, ValueError) as fault:
        raise ValueError(f"{cluster.gres!r}: {{processes_per_node}} is the only name that it may use") from fault
    counts: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        # The most particular name stands for the item: gpu:a100:4 asks for gpu:a100, not for any four.
        counts |= {max(gres_counts(item), key=len): max(gres_counts(item).values())}
    return counts


def node_memory_mb(facts: ClusterFacts, cluster: ClusterConfig, launcher: SlurmConfig) -> tuple[float, str] | None:
    """MB that a job gets on each node, and by what; None when nobody says.

    ``cluster.memory_per_node``, else the site's default, else all of the smallest node.
    """
    nodes = facts.nodes_of(cluster)
    smallest = min((node.memory_mb for node in nodes), default=0)
    if (asked := memory_mb(cluster.memory_per_node)) is not None and asked > 0:
        return asked, f"cluster.memory_per_node={cluster.memory_per_node}"
    if not smallest:
        return None
    if cluster.memory_per_node is None:
        if (default := memory_mb(facts.config.get("DefMemPerNode"))) is not None:
            return default, "the site's DefMemPerNode"
        if (each := memory_mb(facts.config.get("DefMemPerCPU"))) is not None:
            cpus = launcher.processes_per_node * (launcher.threads_per_process or 1)
            return each * cpus, f"the site's DefMemPerCPU x {cpus} CPUs"
    return float(smallest), "the smallest node's memory"
