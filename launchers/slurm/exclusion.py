"""Nodes that a run is kept away from, and when it is let back to them. Torch-free.

An exclusion must not keep a run from ever starting: it is lifted where too few nodes would remain (Slurm itself gives
out no node that is down), when the node's slurmd has been started again since, and by itself after a day (see
:func:`launchers.lifecycle.exclusions.exclusions`). What is lifted is journalled and said.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from launchers.lifecycle import journal
from launchers.lifecycle.attempt import say
from launchers.lifecycle.exclusions import excluded_nodes, exclusions
from launchers.run_dir import RunDir
from launchers.slurm.commands import Slurm, SlurmError
from launchers.slurm.start import Allocation
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config


def settle(run: RunDir, config: Config, slurm: Slurm, job: int) -> list[str]:
    """The nodes to leave out when ``job`` is queued again; all that the journal names while Slurm does not answer."""
    wanted = exclusions(journal.read_journal(run), time.time())
    if not wanted:
        return []
    try:
        infos, partitions, info = slurm.nodes(), slurm.partitions(), slurm.job(job)
        own = {name for words in config.cluster.exclude for name in slurm.expand(words)}
    except SlurmError:
        return sorted(wanted)
    mended = [
        name
        for name, since in wanted.items()
        if name in infos and infos[name].is_usable and (infos[name].slurmd_start or 0.0) > since
    ]
    _lift(run, mended, "started again since")
    left = set(wanted) - set(mended)
    names = info.partition.split(",") if info is not None else []
    members = {node for name in names if name in partitions for node in partitions[name].nodes}
    usable = {name for name in members - own if name in infos and infos[name].is_usable}
    least = _least_nodes(config)
    if left and members and len(usable - left) < least:
        _lift(run, left, f"the run needs {least} node(s), and without these {len(usable - left)} usable one(s) remain")
        return []
    return sorted(left)


def readmit(run: RunDir, config: Config, allocation: Allocation) -> None:
    """Takes nodes that this life of the job was given all the same, where the run cannot do without them: someone has
    let them in again, by ``scontrol update JobId=N ExcNodeList=``, say."""
    given = excluded_nodes(journal.read_journal(run)) & set(allocation.nodes)
    if given and len(allocation.nodes) - len(given) < _least_nodes(config):
        _lift(run, given, "Slurm gave them to the job all the same")


def _least_nodes(config: Config) -> int:
    launcher = config.launcher
    assert isinstance(launcher, SlurmConfig)
    return launcher.min_nodes or launcher.num_nodes


def _lift(run: RunDir, nodes: Iterable[str], why: str) -> None:
    names = sorted(nodes)
    if names:
        say(f"no longer kept away from {', '.join(names)}: {why}")
        journal.append(run, "exclusion_lifted", nodes=names, reason=why)
