"""``metrics.jsonl``: the run's own record of what happened, one JSON object a line. Torch-free.

It is written first and always; MLflow, the progress display and plots only read it. Lines are appended
whole, a line torn by a crash is skipped by readers and closed by the next writer. Numbers that JSON lacks
are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, so that any JSON reader can read the file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class MetricsLog:
    """Appends records of one attempt to ``path``.

    ``fence`` is called before each write and raises when this attempt may no longer write.
    """

    def __init__(self, path: Path, attempt: int, fence: Callable[[], None] | None = None) -> None:
        self._attempt = attempt
        self._fence = fence
        if fence is not None:
            fence()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        self._torn = bool(size) and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def write(
        self, event: str, step: int | None = None, *, metrics: Mapping[str, Any] | None = None, **fields: Any
    ) -> Record:
        """Appends one record and returns it. ``metrics`` values are anything that ``float`` takes.

        Raises OSError when the line cannot be written whole (disk full), and what ``fence`` raises.
        """
        record: Record = {"time": time.time(), "attempt": self._attempt, "event": event}
        if step is not None:
            record["step"] = int(step)
        if metrics is not None:
            record["metrics"] = {name: float(value) for name, value in metrics.items()}
        record.update(fields)
        line = json.dumps(_encode(record), allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n"
        if self._fence is not None:
            self._fence()
        # A line that a crash or a full disk cut short is closed, so that it takes no other with it.
        if self._torn:
            line = b"\n" + line
        self._torn = True
        # One call a line, so that lines of two writers cannot mix and a crash tears at most the last one.
        while line:
            line = line[os.write(self._descriptor, line) :]
        self._torn = False
        return record

    def close(self) -> None:
        """Closes the file; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decode(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "event" not in record:
        return None
    if isinstance(record.get("metrics"), dict):
        record["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
    return record


class MetricsTail:
    """Reads records as they are appended. ``offset`` is the position in bytes after the last line read."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def read(self, limit_bytes: int = 1 << 24) -> list[Record]:
        """Records of whole lines appended since the last call; none when the file does not exist yet."""
        try:
            # Cheap when nothing happened, which is nearly always.
            if os.stat(self.path).st_size <= self.offset:
                return []
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(limit_bytes)
                # A line longer than the limit is read whole: it must not hold up those that follow.
                if len(data) == limit_bytes and b"\n" not in data:
                    data += stream.readline()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [record for line in whole.splitlines() if (record := _decode(line)) is not None]


def read_records(path: Path) -> list[Record]:
    """All readable records in the order written, also a last one that lacks only its newline.

    Raises FileNotFoundError.
    """
    return [record for line in path.read_bytes().split(b"\n") if (record := _decode(line)) is not None]


_RECENT_BYTES = 1 << 24


def recent_records(path: Path) -> list[Record]:
    """Records of the whole file, or of the end of one that is long; none when it cannot be read."""
    try:
        return MetricsTail(path, max(0, os.stat(path).st_size - _RECENT_BYTES)).read(_RECENT_BYTES)
    except OSError:
        return []


# What only a training attempt writes; an attempt that failed before its first step rolled nothing back.
_TRAINING = ("start", "train", "eval")


def effective_records(records: Iterable[Record]) -> list[Record]:
    """The run's history without steps that were rolled back.

    An attempt whose ``start`` record says step s continues from there, so records of earlier attempts about
    steps after s are dropped (without ``start``: from its first step on). So are those after the step to which an
    attempt went back by itself (``to_step`` of a ``health`` record). Of several records of one event
    about one step, as of an evaluation repeated after a resume, the last counts.
    """
    kept: list[Record] = []
    attempt: int | None = None
    for record in records:
        step = record.get("step")
        if step is not None and record["event"] in _TRAINING and record.get("attempt") != attempt:
            attempt = record.get("attempt")
            last_valid = step if record["event"] == "start" else step - 1
            kept = [old for old in kept if old.get("step") is None or old["step"] <= last_valid]
        if record["event"] == "health" and "to_step" in record:
            kept = [old for old in kept if old.get("step", -1) <= record["to_step"] or old["event"] == "health"]
        kept.append(record)
    last_of: dict[tuple[str, int], int] = {
        (record["event"], record["step"]): index
        for index, record in enumerate(kept)
        if record["event"] in ("train", "eval")
    }
    return [
        record
        for index, record in enumerate(kept)
        if record["event"] not in ("train", "eval") or last_of[(record["event"], record["step"])] == index
    ]


def series(records: Iterable[Record], event: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of metric ``name`` over the records of ``event``."""
    pairs = [
        (record["step"], record["metrics"][name])
        for record in records
        if record["event"] == event and name in record.get("metrics", {})
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]
