"""Fewer nodes than asked for: the largest layout of a run that fits what is there. Torch-free.

A change is a numbered revision of the run's configuration, as a user's own would be, and is noted in the journal with
the full size, so that the run grows again when its nodes are back. Global batch and data order stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from launchers.lifecycle.journal import append, last_entry, read_journal
from launchers.run_dir import RunDir
from pretrain.config.check import check
from pretrain.config.freeze import differences
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.schema import Config
from pretrain.config.violation import InvalidConfigError


@dataclass(frozen=True)
class Layout:
    """Ranks, spread evenly over nodes."""

    num_nodes: int
    num_processes: int

    def on(self, num_nodes: int) -> Layout:
        """The same ranks per node on another number of nodes."""
        return Layout(num_nodes, num_nodes * (self.num_processes // self.num_nodes))


def layout_of(config: Config) -> Layout:
    launcher = config.launcher
    assert isinstance(launcher, SlurmConfig)
    return Layout(launcher.num_nodes, launcher.num_processes)


def full_layout(run: RunDir, config: Config) -> Layout:
    """What the run's user asked for: the configuration's, unless this module made it smaller."""
    current = layout_of(config)
    entry = last_entry(read_journal(run), "resized")
    if entry is not None and current == Layout(entry["num_nodes"], entry["num_processes"]):
        return Layout(entry["full_nodes"], entry["full_processes"])
    return current


def resized(tree: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The configuration's tree with another layout."""
    changed = deepcopy(dict(tree))
    changed["launcher"] |= {"num_nodes": layout.num_nodes, "num_processes": layout.num_processes}
    return changed


def fit(tree: Mapping[str, Any], full: Layout, min_nodes: int | None, num_nodes: int) -> Layout | None:
    """The largest layout on at most ``num_nodes`` nodes that the configuration allows; None when there is none."""
    least = min_nodes if min_nodes is not None else full.num_nodes
    for count in range(min(num_nodes, full.num_nodes), max(least, 1) - 1, -1):
        layout = full.on(count)
        try:
            check(resized(tree, layout))
        except InvalidConfigError:
            continue
        return layout
    return None


def adapt(run: RunDir, config: Config, num_nodes: int) -> Config | None:
    """The configuration for at most ``num_nodes`` nodes, frozen as a revision where it changes; None: none fits."""
    tree = run.config()
    launcher = config.launcher
    assert isinstance(launcher, SlurmConfig)
    full = full_layout(run, config)
    layout = fit(tree, full, launcher.min_nodes, num_nodes)
    if layout is None:
        return None
    if layout == layout_of(config):
        return config
    changed = resized(tree, layout)
    number = run.add_revision(changed, differences(tree, changed))
    append(
        run,
        "resized",
        revision=number,
        num_nodes=layout.num_nodes,
        num_processes=layout.num_processes,
        full_nodes=full.num_nodes,
        full_processes=full.num_processes,
    )
    return check(changed)


def at_full_size(run: RunDir, config: Config) -> Config:
    """The configuration to submit with: that of the full layout."""
    full = full_layout(run, config)
    return config if full == layout_of(config) else check(resized(run.config(), full))
