"""The few files of a run directory that tracking reads.

Tracking works on a run directory's files alone, so that a run can be sent to MLflow from a live rank or
long after its end. Torch-free and light.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

_REVISION = re.compile(r"^(\d{4,})\.yaml$")


def latest_config_file(run_path: Path) -> tuple[int, Path]:
    """Number and path of the highest frozen revision; revision 0 is ``config.yaml`` itself."""
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        numbers = [int(m.group(1)) for entry in os.listdir(run_path / "revisions") if (m := _REVISION.match(entry))]
    if not numbers:
        return 0, run_path / "config.yaml"
    return max(numbers), run_path / "revisions" / f"{max(numbers):04d}.yaml"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level with dotted names; lists and empty mappings stay values of their own."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def redact_url(text: str) -> str:
    """Hides the ``user:password@`` part of URLs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
