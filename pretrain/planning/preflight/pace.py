"""How fast a run was, read from its records; and which earlier run says something about another one. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pretrain.tracking.metrics_log import MetricsTail, Record
from pretrain.tracking.run_files import latest_config_file

_LAST_STEPS = 200
_WARM_UP = 2
"""Steps of an attempt that are slower than the rest: allocation, compilation, first files."""
_FEWEST = 3
_MOST_RUNS = 100
_TAIL_BYTES = 4 << 20

SAME: tuple[str, ...] = (
    "model",
    "objective",
    "engine",
    "optimizer.name",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.precision",
    "train.activation_checkpointing",
    "data._target_",
    "data.sequence_length",
    "launcher.name",
    "launcher.num_processes",
    "launcher.num_nodes",
    "launcher.threads_per_process",
    "launcher.device",
    "cluster.gres",
    "cluster.partition",
    "cluster.constraint",
)
"""What the time of a step depends on. Two runs that agree in all of it are taken to be equally fast."""


@dataclass(frozen=True)
class Pace:
    """Measured seconds; None for what was not measured. ``step_s`` is the median of ``steps`` steps.

    ``eval_s`` of one validation, ``stall_s`` for which training stands still for a checkpoint, ``save_s`` until a
    checkpoint is published, ``startup_s`` from the start of an attempt to its first step.
    """

    source: str
    step_s: float
    steps: int
    eval_s: float | None = None
    stall_s: float | None = None
    save_s: float | None = None
    startup_s: float | None = None


def pace_of(run_path: Path) -> Pace | None:
    """What the newest attempt that trained tells; None when none did for long enough."""
    path = run_path / "metrics.jsonl"
    try:
        size = path.stat().st_size
    except OSError:
        return None
    records = MetricsTail(path, max(size - _TAIL_BYTES, 0)).read(_TAIL_BYTES)
    times: dict[int, list[float]] = {}
    for record in records:
        if record["event"] == "train" and "step_s" in record.get("metrics", {}):
            times.setdefault(record["attempt"], []).append(record["metrics"]["step_s"])
    for attempt in sorted(times, reverse=True):
        warm = times[attempt][_WARM_UP:][-_LAST_STEPS:]
        if len(warm) >= _FEWEST:
            return Pace(
                f"{run_path}, attempt {attempt}",
                median(warm),
                len(warm),
                eval_s=_median(records, attempt, "eval", "seconds"),
                stall_s=_median(records, attempt, "checkpoint", "stall_s"),
                save_s=_median(records, attempt, "checkpoint", "seconds"),
                startup_s=_startup(run_path, records, attempt),
            )
    return None


def pace_of_equal_run(tree: Mapping[str, Any], root: Path) -> Pace | None:
    """The pace of the newest run below ``root`` with the same model and layout."""
    wanted = signature(tree)
    for path in _newest_runs(root):
        config = _load(latest_config_file(path)[1])
        if config is not None and signature(config) == wanted and (pace := pace_of(path)) is not None:
            return pace
    return None


def signature(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values at :data:`SAME`, with those that are absent as None, as in configurations of earlier releases."""
    return {path: _value(tree, path) for path in SAME}


def _value(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    if path == "launcher.num_nodes" and node is None:
        return 1
    return _plain(node)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _newest_runs(root: Path) -> Iterator[Path]:
    found = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                try:
                    changed = os.stat(os.path.join(entry.path, "metrics.jsonl")).st_mtime
                except OSError:
                    continue
                found.append((changed, entry.path))
    except OSError:
        return
    for _, path in sorted(found, reverse=True)[:_MOST_RUNS]:
        yield Path(path)


def _load(path: Path) -> dict[str, Any] | None:
    import yaml

    try:
        # The loader in C reads a hundred configurations in the time of ten.
        loaded = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _median(records: list[Record], attempt: int, event: str, name: str) -> float | None:
    values = [
        float(record[name])
        for record in records
        if record["event"] == event and record.get("attempt") == attempt and name in record
    ]
    return median(values) if values else None


def _startup(run_path: Path, records: list[Record], attempt: int) -> float | None:
    """From the launcher's journal to the beginning of the first step, where both are recorded."""
    from launchers.lifecycle.journal import read_journal

    started = [
        float(entry["time"])
        for entry in read_journal(run_path)
        if entry.get("event") == "attempt_started" and entry.get("attempt") == attempt
    ]
    own = [record for record in records if record.get("attempt") == attempt]
    first = next((record for record in own if record["event"] == "train"), None)
    # Without the record of the attempt's start the tail does not reach back to its first step.
    if not started or first is None or not any(record["event"] == "start" for record in own):
        return None
    return max(float(first["time"]) - first["metrics"].get("step_s", 0.0) - started[-1], 0.0)
