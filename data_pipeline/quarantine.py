"""What happens when data turn out damaged while they are read: stop, or substitute and keep a record."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import DamagedDataError

logger = logging.getLogger("pretrain")

OnDamage = Literal["stop", "substitute"]


Key = tuple[str, str | None, str | None]
"""Source, shard, member."""


class _Quarantine:
    """What is known to be damaged, and the file that outlives the process."""

    def __init__(self) -> None:
        self.entries: dict[Key, dict[str, Any]] = {}
        self.file: Path | None = None
        self.lock = threading.Lock()


class BadData:
    """The policy of one run for one of its sources (``source``: its name, when there are several).

    ``stop``: :meth:`damaged` raises. ``substitute``: it records, and the source fills exactly the rows that are lost
    with others, chosen by key, so that every other row keeps its place. What is in quarantine stays there, also after a
    resume, so that a shard that heals half-way does not change the order of a run.
    """

    def __init__(self, mode: OnDamage = "stop", source: str = "", quarantine: _Quarantine | None = None) -> None:
        self.mode: OnDamage = mode
        self.source = source
        self._quarantine = quarantine or _Quarantine()

    def for_source(self, name: str) -> BadData:
        """The same policy and quarantine for the source ``name`` of a mixture."""
        return BadData(self.mode, name, self._quarantine)

    @property
    def substitutes(self) -> bool:
        """Whether batches carry the array ``substituted`` (bool [B])."""
        return self.mode == "substitute"

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What is in quarantine, of all sources: ``source``, ``shard``, ``member``, ``byte``, ``error``."""
        return list(self._quarantine.entries.values())

    def damaged(self, error: DamagedDataError) -> None:
        """Raise ``error`` (stop), or put its shard's member into quarantine (substitute)."""
        if self.mode == "stop":
            raise error
        key = (self.source, error.shard, error.member)
        quarantine = self._quarantine
        with quarantine.lock:
            if key in quarantine.entries:
                return
            entry = {"source": key[0], "shard": key[1], "member": key[2], "byte": error.byte, "error": str(error)}
            quarantine.entries[key] = entry
            logger.warning("quarantined, its rows are substituted: %s", error)
            if quarantine.file is not None:
                _append(quarantine.file, entry)

    def known(self, shard: str, member: str | None) -> DamagedDataError | None:
        """The error that put this member into quarantine, if one did."""
        entry = self._quarantine.entries.get((self.source, shard, member))
        if entry is None:
            return None
        return DamagedDataError(entry["error"], shard=shard, member=member, byte=entry["byte"])

    def recall(self, folder: Path) -> None:
        """Take over what all ranks wrote into ``folder`` before; nothing is written there."""
        if self.substitutes:
            kept = {_key(entry): entry for entry in read_quarantine(folder)}
            self._quarantine.entries = {**kept, **self._quarantine.entries}

    def keep(self, folder: Path, rank: int) -> None:
        """Take over what all ranks wrote into ``folder`` before, and write what comes to this rank's file there.

        Under ``stop`` a quarantine of earlier attempts is not used: its data are read again.
        """
        if not self.substitutes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        quarantine = self._quarantine
        quarantine.file = folder / f"rank_{rank:05d}.jsonl"
        kept = {_key(entry): entry for entry in read_quarantine(folder)}
        for key, entry in quarantine.entries.items():  # found before there was a folder
            if key not in kept:
                _append(quarantine.file, entry)
        quarantine.entries = {**kept, **quarantine.entries}


def _key(entry: dict[str, Any]) -> Key:
    return entry["source"], entry["shard"], entry["member"]


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    """What all ranks put into quarantine, each shard's member once."""
    found: dict[Key, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for entry in _entries(path):
            found.setdefault(_key(entry), entry)
    return list(found.values())


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill; what it named will be found again


def _append(path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
