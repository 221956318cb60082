"""What of a run directory MLflow has and has not: the files that are sent, and how much of each has arrived.

``mlflow.json`` remembers it: a position in bytes for every file, so that an upload may be cut off anywhere and go on
there, by the training process or long after it. Torch-free and without MLflow.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config.files import atomic_write_text
from pretrain.tracking.convert import metric_values, system_values
from pretrain.tracking.lifecycle import Value, is_settled, lifecycle_values, run_status
from pretrain.tracking.metrics_log import MetricsTail, Record, read_records
from pretrain.tracking.run_files import redact_url

logger = logging.getLogger(__name__)

METRICS, LIFECYCLE, STATE, LOCK = "metrics.jsonl", "lifecycle.jsonl", "mlflow.json", ".mlflow.lock"
# The key by which the run is found in a store, also when what was noted of it is damaged.
KEY = ".mlflow.key"
# Files that a store gets with a run that has ended, beside those listed for it.
_FILES = ("config.yaml", "command.txt", "environment.json", "git.json", "git.diff", "lifecycle.jsonl")
_FOLDERS = ("revisions", "slurm", "reports", "health", "artifacts")
_ATTEMPT = re.compile(r"^attempt_(\d{4,})$")
_NODE = re.compile(r"^node_(\d{5,})\.jsonl$")
# Facts about the run itself, which hold for any store.
_KEPT = ("key", "run_name", "tags", "artifacts")
_TYPES: dict[str, type] = {
    "uri": str,
    "key": str,
    "run_name": str,
    "tags": dict,
    "artifacts": list,
    "sent_artifacts": dict,
    "files": dict,
    "other_stores": dict,
    "num_journal": int,
    "system_attempt": int,
    "offset": int,
}


class Parcel(NamedTuple):
    """Values read and not yet sent, and the state once they have arrived."""

    values: list[Value]
    positions: dict[str, int]
    boundary: Record | None
    num_journal: int
    is_last: bool


class Spool:
    """Reads what is new in ``run_path`` for the store ``uri``, from what ``mlflow.json`` says has arrived."""

    def __init__(self, run_path: Path, uri: str) -> None:
        self.run_path = run_path
        self._shown_uri = redact_url(uri)
        self._state_path = run_path / STATE
        self._saved = self._saved_key = ""
        self._is_damaged = False
        self.state: dict[str, Any] = {}
        self.load()

    # ---- what is remembered ----------------------------------------------------------------------

    def load(self) -> None:
        """Reads ``mlflow.json`` again: another sender may have got further."""
        state: dict[str, Any] = {}
        text = ""
        try:
            text = self._state_path.read_text(encoding="utf-8")
            state = _checked(json.loads(text))
            self._is_damaged = False
        except FileNotFoundError:
            # A name once given stays, also while it cannot be written (a full disk).
            state = dict(self.state)
        except ValueError:
            if not self._is_damaged:
                logger.warning("%s: damaged; the MLflow run is looked up anew", self._state_path)
            self._is_damaged = True
            state = dict(self.state)
        if state.get("uri") != self._shown_uri:
            # Another store knows nothing of this run yet, or what was noted for it when it was the last one sent to.
            kept: dict[str, Any] = {name: state.pop(name) for name in _KEPT if name in state}
            others: dict[str, Any] = state.pop("other_stores", {})
            if state.get("uri") and state.get("run_id"):
                others[state["uri"]] = state
            state = {"uri": self._shown_uri, **others.pop(self._shown_uri, {}), **kept, "other_stores": others}
        if "key" not in state:
            state["key"] = self._read_key() or uuid.uuid4().hex
        state.setdefault("run_name", self.run_path.name)
        state.setdefault("tags", {})
        state.setdefault("artifacts", [])
        state.setdefault("sent_artifacts", {})
        state.setdefault("files", {})
        if "offset" in state:  # as written before other files were sent
            state["files"].setdefault(METRICS, state.pop("offset"))
        for name in ("run_id", "experiment_id", "boundary", "status"):
            state.setdefault(name, None)
        for name in ("num_journal", "system_attempt"):
            state.setdefault(name, 0)
        state.setdefault("unclosed", False)  # ended there, and not all files have followed
        self.state, self._saved = state, text

    def save(self) -> None:
        """Writes ``mlflow.json`` when something has changed. Raises OSError; the old file is then untouched."""
        if self.state["key"] != self._saved_key:
            # Once in a run's life, before the store hears of the key.
            if self._read_key() != self.state["key"]:
                atomic_write_text(self.run_path / KEY, self.state["key"] + "\n")
            self._saved_key = self.state["key"]
        text = json.dumps(self.state, indent=1) + "\n"
        if text != self._saved:
            atomic_write_text(self._state_path, text)
            self._saved = text

    def forget(self) -> None:
        """Takes the whole record as not sent yet."""
        self.state |= {"files": {}, "num_journal": 0, "system_attempt": 0, "sent_artifacts": {}, "status": None}
        self.state["unclosed"] = False

    def _read_key(self) -> str:
        """The key as kept beside ``mlflow.json``; empty where there is none."""
        try:
            return (self.run_path / KEY).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, ValueError):
            return ""

    # ---- what is new -----------------------------------------------------------------------------

    def journal(self) -> list[Record]:
        """All records of lifecycle.jsonl; none without a supervisor."""
        try:
            return read_records(self.run_path / LIFECYCLE)
        except FileNotFoundError:
            return []

    def read(self, journal: list[Record], limit_bytes: int = 1 << 17) -> Parcel:
        """New values in the order written: the run's own, its journal's, then each node's samples."""
        values: list[Value] = []
        positions: dict[str, int] = {}
        boundary: Record | None = self.state["boundary"]
        more = False
        for name, records, has_more in self._new_records(limit_bytes, positions):
            more |= has_more
            if name == METRICS:
                for record in records:
                    values += metric_values(record)
                    if record["event"] in ("start", "end"):
                        kept = ("time", "event", "attempt", "status")
                        boundary = {field: record[field] for field in kept if field in record}
                values += lifecycle_values(journal, self.state["num_journal"])
            else:
                node = int(name.rpartition("_")[2].removesuffix(".jsonl"))
                origin = self.origin()
                for record in records:
                    values += system_values(record, node, 0.0 if origin is None else origin)
        return Parcel(values, positions, boundary, len(journal), not more)

    def arrived(self, parcel: Parcel) -> None:
        """Notes that ``parcel`` is in the store."""
        self.state["files"] |= parcel.positions
        self.state["boundary"], self.state["num_journal"] = parcel.boundary, parcel.num_journal
        self._pass_over_old_attempts()

    def is_delivered(self) -> bool:
        """Whether the store has all that this run has recorded so far. Reads sizes and the journal only."""
        return not self.missing()

    def missing(self) -> list[str]:
        """What the store does not have yet, in words; nothing when it has all."""
        state, journal, found = self.state, self.journal(), []
        num_bytes = sum(max(0, size - state["files"].get(name, 0)) for name, size in self._sizes())
        if num_bytes and not all(self._is_read(name, size) for name, size in self._sizes()):
            found.append(f"{num_bytes:,} bytes of records")
        finished = (state["boundary"] or {}).get("attempt") if state["status"] == "FINISHED" else None
        if not is_settled(journal, state["num_journal"], finished):
            found.append(f"{len(journal) - state['num_journal']} entries of {LIFECYCLE}")
        # RUNNING is what every store takes a run for until it hears otherwise.
        status = run_status(journal, state["boundary"])
        if status is not None and status.name not in ("RUNNING", state["status"]):
            found.append(f"the status {status.name}")
        if state["unclosed"]:
            found.append(f"{len(self.unsent_artifacts())} files")
        return found if found or state["run_id"] is not None else ["the run itself"]

    def unsent_artifacts(self) -> list[tuple[Path, str]]:
        """Files that a store is to have and has not as they are now, with a mark of how they are."""
        own = [self.run_path / name for name in _FILES]
        listed = [Path(path) for path in self.state["artifacts"]]
        found = sorted(path for folder in _FOLDERS for path in (self.run_path / folder).rglob("*"))
        unsent = []
        for path in dict.fromkeys((*own, *listed, *found)):
            stat = path.stat() if path.is_file() else None
            version = f"{stat.st_size} {stat.st_mtime_ns}" if stat is not None and stat.st_size else None
            if version is not None and self.state["sent_artifacts"].get(str(path)) != version:
                unsent.append((path, version))
        return unsent

    def origin(self) -> float | None:
        """Unix time of the run's first record; None before there is one."""
        first = MetricsTail(self.run_path / METRICS).read(1 << 14)
        return float(first[0]["time"]) if first else None

    def _new_records(self, limit_bytes: int, positions: dict[str, int]) -> Iterator[tuple[str, list[Record], bool]]:
        """Each file's name, its new records and whether it has more; notes the position after them. At most
        ``limit_bytes`` altogether, up to one line."""
        left = limit_bytes
        for name, size in self._sizes():
            start = self.state["files"].get(name, 0)
            tail = MetricsTail(self.run_path / name, start if start <= size else 0)  # a shorter one came from a backup
            start = tail.offset
            records = tail.read(left) if left > 0 else []
            positions[name] = tail.offset
            left -= tail.offset - start
            # A last line without its end is being written, or was torn: it does not count.
            yield name, records, size > tail.offset and (tail.offset > start or left <= 0)

    def _is_read(self, name: str, size: int) -> bool:
        position = self.state["files"].get(name, 0)
        return size <= position or not MetricsTail(self.run_path / name, position).read()

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the files to send, the run's own first. A node's samples wait for the run's first record:
        their steps count from it."""
        size = _size(self.run_path / METRICS)
        yield METRICS, size
        if size:
            for attempt in self._attempts():
                folder = self.run_path / "system" / attempt
                for name in sorted(name for name in _names(folder) if _NODE.match(name)):
                    yield f"system/{attempt}/{name}", _size(folder / name)

    def _attempts(self) -> list[str]:
        numbered = [(int(m.group(1)), name) for name in _names(self.run_path / "system") if (m := _ATTEMPT.match(name))]
        return [name for number, name in sorted(numbered) if number >= self.state["system_attempt"]]

    def _pass_over_old_attempts(self) -> None:
        """Attempts that are over and sent need not be looked at again: of many attempts on many nodes, that is much."""
        attempts = self._attempts()
        for attempt, following in itertools.pairwise(attempts):
            own = {name: size for name, size in self._sizes() if name.startswith(f"system/{attempt}/")}
            if not all(self._is_read(name, size) for name, size in own.items()):
                return
            for name in own:
                self.state["files"].pop(name, None)
            self.state["system_attempt"] = int(following.removeprefix("attempt_"))


def _checked(state: Any) -> dict[str, Any]:
    """What was noted, less what cannot be used. Raises ValueError when it is no object at all."""
    if not isinstance(state, dict):
        raise ValueError("not a JSON object")
    return {name: value for name, value in state.items() if isinstance(value, _TYPES.get(name, object))}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
