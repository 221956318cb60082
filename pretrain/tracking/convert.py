"""Records of a run as metric values: names, time stamps and steps under which MLflow keeps them. Torch-free.

The same record gives the same values at every reading: that is what makes sending twice harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.tracking.lifecycle import Value
from pretrain.tracking.metrics_log import Record

MAX_NAME = 250
# Events that carry their numbers beside other fields, and which of those are numbers worth a chart.
_FIELDS = {
    "checkpoint": ("seconds", "stall_s", "write_s", "bytes"),
    "eval": ("seconds",),
    "health": ("loss", "grad_norm", "zscore", "median"),
}


def metric_values(record: Record) -> Iterator[Value]:
    """Values of one record of metrics.jsonl, named ``event/name``.

    A ``health`` record also gives ``health/<kind>`` = 1 at its step: a chart then marks the bad steps.
    """
    event, when, step = str(record["event"]), float(record["time"]), int(record.get("step") or 0)
    numbers: dict[str, Any] = dict(record["metrics"]) if isinstance(record.get("metrics"), dict) else {}
    for name in _FIELDS.get(event, ()):
        if _is_number(record.get(name)):
            numbers.setdefault(name, record[name])
    if isinstance(record.get("counters"), Mapping):
        numbers |= {name: value for name, value in record["counters"].items() if _is_number(value)}
    if event == "health" and record.get("kind"):
        numbers[str(record["kind"])] = 1.0
    for name, value in numbers.items():
        yield Value(fitting_name(f"{event}/{name}"), float(value), when, step)


def system_values(record: Record, node: int, origin: float) -> Iterator[Value]:
    """Values of one sample of a node, named ``system/node_00000/name``; the step is the second of the run.

    ``origin`` is the unix time of the run's first record. Seconds go on growing over attempts, training steps do not.
    """
    step = max(0, int(record["time"] - origin))
    for name, value in record.get("metrics", {}).items():
        yield Value(fitting_name(f"system/node_{node:05d}/{name}"), float(value), float(record["time"]), step)


def fitting_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and ``_-. :/`` only, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME]


def _is_number(value: object) -> bool:
    # Not finite numbers are these strings in the file.
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("NaN", "Infinity", "-Infinity")
