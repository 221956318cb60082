"""Reading the files of a run directory as they are: torn, damaged, half-written or absent. Torch-free.

Whoever watches a run reads while others write, perhaps over a network file system, perhaps after a crash. Nothing here
raises for what a file holds; :class:`Reader` collects which files could not be understood, so that it can be said.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAIL_BYTES = (1 << 18, 1 << 22)
"""How much of the end of a long file is read: first, and once more when what is looked for was not in it."""

Record = dict[str, Any]


class Reader:
    """Reads files below ``root``; ``faults`` are sentences about those that are there but cannot be read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[str] = []

    def _fault(self, path: Path, error: object) -> None:
        name = os.path.relpath(path, self.root)
        fault = f"{name}: {error}"
        if fault not in self.faults:
            self.faults.append(fault)

    def bytes(self, path: Path) -> bytes | None:
        """The whole file; None when it is absent or cannot be read."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._fault(path, error.strerror or error)
            return None

    def json(self, path: Path) -> Record:
        """A JSON object; empty when the file is absent or holds something else."""
        data = self.bytes(path)
        if data is None:
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            self._fault(path, "damaged (no JSON)")
            return {}
        if not isinstance(value, dict):
            self._fault(path, "damaged (no JSON object)")
            return {}
        return value

    def yaml(self, path: Path, sections: Sequence[str]) -> Record:
        """These sections of a YAML mapping; empty when the file is absent or holds something else."""
        import yaml

        data = self.bytes(path)
        if data is None:
            return {}
        # Most of a frozen configuration is not wanted, and YAML is slow to read.
        data = _sections(data, sections) or data
        try:
            # The C loader reads a frozen configuration ten times as fast, where it was built in.
            value = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError, LookupError, ArithmeticError):
            self._fault(path, "damaged (no YAML)")
            return {}
        if not isinstance(value, dict):
            self._fault(path, "damaged (no YAML mapping)")
            return {}
        return value

    def lines(self, path: Path) -> list[Record]:
        """Every readable JSON object, one a line, that has a text as its ``event``."""
        return _records(self.bytes(path) or b"")

    def tail(self, path: Path, limit: int) -> tuple[list[Record], bool]:
        """The records among the last ``limit`` bytes, and whether these are the whole file."""
        try:
            with open(path, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - limit))
                data = stream.read(limit)
        except (FileNotFoundError, NotADirectoryError):
            return [], True
        except OSError as error:
            self._fault(path, error.strerror or error)
            return [], True
        if size <= limit:
            return _records(data), True
        return _records(data[data.find(b"\n") + 1 :]), False

    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted; none when it is absent or cannot be read."""
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._fault(folder, error.strerror or error)
            return []


def _sections(data: bytes, names: Sequence[str]) -> bytes:
    """The lines of some top-level keys in block style."""
    wanted = [b"%s:" % name.encode() for name in names]
    lines, inside = [], False
    for line in data.splitlines():
        if line[:1] not in (b" ", b"-", b""):
            inside = line.rstrip() in wanted
        if inside:
            lines.append(line)
    return b"\n".join(lines)


def _records(data: bytes) -> list[Record]:
    found = []
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            found.append(record)
    return found


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A field as a float (NaN and infinities too, which the metrics log spells as text); None for anything else."""
    value = record.get(name)
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def finite(record: Mapping[str, Any], name: str) -> float | None:
    """A field as a finite float of a sensible size (unix seconds, durations); None for anything else."""
    value = number(record, name)
    return value if value is not None and math.isfinite(value) and abs(value) < 1e12 else None


def integer(record: Mapping[str, Any], name: str) -> int | None:
    """A field as an int; None for anything else."""
    value = record.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62 else None


def text(record: Mapping[str, Any], name: str) -> str | None:
    """A field as text; numbers (a job id) become text, empty text and all else None."""
    value = record.get(name)
    if isinstance(value, str):
        return _printable(value) or None
    whole = integer(record, name)
    return None if whole is None else str(whole)


def texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field as a tuple of texts, leaving out what is none."""
    value = record.get(name)
    if not isinstance(value, list):
        return ()
    return tuple(_printable(item) for item in value if isinstance(item, str) and item)


def _printable(value: str) -> str:
    """Without what a terminal would obey and what cannot be encoded (a lone surrogate, which JSON allows)."""
    encodable = value.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in encodable)


def mapping(record: Mapping[str, Any], name: str) -> Record:
    """A field as a mapping; empty for anything else."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def count(record: Mapping[str, Any], name: str) -> float | None:
    """A count (of tokens), which may be far larger than a time; None for anything else."""
    value = number(record, name)
    return value if value is not None and 0 <= value < 1e18 else None
