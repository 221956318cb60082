"""Constants as ``pretrain offload probe --save`` writes them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pretrain.optim.offload.constants import Constants

_ANEW = "write it anew with `pretrain offload probe --save FILE`"
# Bytes/s and elements/s that something could have; beyond them a file is damaged or in other units.
SLOWEST, FASTEST = 1.0, 1e18
LONGEST_LATENCY = 1e3


def read_constants(path: Path) -> tuple[Constants, Mapping[str, Any]]:
    """Constants, and what the file says of their measurement: ``host``, ``device``, ``date``.

    Raises:
        OSError: ``path`` cannot be read.
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"constants: {path} is no JSON ({said}); {_ANEW}") from error
    content = content if isinstance(content, dict) else {}
    found, about = content.get("constants", content), content.get("measured", {})
    names = [f.name for f in fields(Constants)]
    if not isinstance(found, dict) or not found.keys() & set(names):
        raise ValueError(f"constants: {path} holds none, expected numbers {', '.join(names)}; {_ANEW}")
    for name in names:
        low, high = {"latency": (0.0, LONGEST_LATENCY), "link_with_cpu": (0.0, 1.0)}.get(name, (SLOWEST, FASTEST))
        value = found.get(name)
        if not _is_within(value, low, high) or (value == 0 and name != "latency"):
            above = "above 0" if name == "link_with_cpu" else f"from {low:g}"
            shown = "nothing" if value is None else f"{value!r:.40}" if not isinstance(value, int) else "another number"
            raise ValueError(f"constants: {path}: {name} is {shown}, expected a number {above} to {high:g}; {_ANEW}")
    return Constants(**{name: float(found[name]) for name in names}), about if isinstance(about, dict) else {}


def _is_within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
