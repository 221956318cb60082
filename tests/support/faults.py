"""Overrides that make a run of the tiny experiment fail as a test wants (see fault_component/faulty.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMPONENT = Path(__file__).with_name("fault_component")


def faulty(*faults: dict[str, Any], global_batch: int = 4, pace_s: float = 0.0) -> list[str]:
    """Overrides for an objective with ``faults``, such as ``fault("kill", step=3, rank=1, once=path)``."""
    listed = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in each.items()) + "}" for each in faults)
    objective = f"{{_target_: faulty.FaultyConfig, global_batch: {global_batch}, pace_s: {pace_s}, faults: [{listed}]}}"
    return [f"run.import_paths=[{COMPONENT}]", f"objective={objective}"]


def fault(kind: str, step: int, rank: int | None = None, once: Path | None = None, **more: Any) -> dict[str, Any]:
    """One fault; ``rank`` None: on every rank, ``once`` None: each time that the step is reached."""
    chosen = {"rank": rank, "once": once, **more}
    return {"kind": kind, "step": step, **{name: value for name, value in chosen.items() if value is not None}}
