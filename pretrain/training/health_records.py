"""Bad steps as files of the run directory, ``health/step_N.json``: what happened and what was left out. Torch-free.

The files are the run's memory of what is skipped until a checkpoint holds it, and for good of how often it happened.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.config.files import atomic_write_text

_NAME = re.compile(r"step_(\d{8,})\.json")


class HealthRecordError(ValueError):
    """A file of bad steps cannot be read."""


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All bad steps of a run, by step, each as it was written; none for a folder that does not exist.

    Raises:
        HealthRecordError: naming the damaged file. Without it batches would be trained on that were left out.
    """
    events: list[dict[str, Any]] = []
    names = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []
    for path in names:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["events"]
            events += [event | {"skipped": [int(batch) for batch in event["skipped"]]} for event in found]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HealthRecordError(
                f"{path} is damaged ({error}); it tells which batches the run leaves out. Restore it, or remove it if "
                "the run may train on them"
            ) from error
    return events


class HealthRecords:
    """Writes them; one writer."""

    def __init__(self, folder: Path, attempt: int, fence: Callable[[], None]) -> None:
        self._folder = folder
        self._attempt = attempt
        self._fence = fence

    def add(self, step: int, facts: Mapping[str, Any]) -> Path:
        """Record a bad step under its number, beside earlier ones at the same step.

        A batch at which the run stopped before takes the place of its earlier record.

        Raises:
            OSError: the file cannot be written.
            HealthRecordError: there is a damaged one.
        """
        self._fence()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:08d}.json"
        events = [event for event in read_events(self._folder) if event["step"] == step] if path.is_file() else []
        batch = facts["batch"]
        events = [event for event in events if event["batch"] != batch or event["action"] != "stop"]
        events.append({"time": time.time(), "attempt": self._attempt, "step": step, **facts})
        text = json.dumps({"step": step, "events": plain(events)}, indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write_text(path, text + "\n")
        return path


def plain(value: Any) -> Any:
    """JSON-able; numbers that JSON lacks are the strings that ``metrics.jsonl`` has for them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if value is None or isinstance(value, str | bool | int):
        return value
    return value.item() if hasattr(value, "item") else str(value)
