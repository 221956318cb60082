"""The plan of a sample set: which neighbouring samples form each segment and how many rows it gives.

Needs the sidecars alone, never a shard. Cached beside the manifest, so that a later start reads no sidecar but those
of the segments that it opens.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange
from data_pipeline.media.samples import SampleReader, num_bytes, range_of
from data_pipeline.plan import plan_name
from data_pipeline.store.manifest import Manifest, Sample, digest_of

SEGMENTS = "segments-1"
CountRows = Callable[[Sequence[Sample]], tuple[int, int]]
"""Rows that a segment's samples give, and positions with a target in them."""


@dataclass(frozen=True)
class SamplePlan:
    """Segment s is samples ``[first[s], first[s] + count[s])`` of shard number ``shard[s]``, lies in bytes
    ``[start[s], stop[s])`` of it and gives ``rows[s]`` rows with ``positions[s]`` targets in all."""

    shard: np.ndarray
    first: np.ndarray
    count: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, sequence_length: int) -> float:
        """Share of the positions in all rows that hold a target."""
        return float(self.positions.sum() / (self.rows.sum() * sequence_length))

    def samples(self, reader: SampleReader, segment: int) -> list[Sample]:
        """The samples of ``segment``. Raises DamagedDataError."""
        first = int(self.first[segment])
        return reader.samples(int(self.shard[segment]))[first : first + int(self.count[segment])]

    def byte_range(self, reader: SampleReader, segment: int) -> ByteRange:
        """Where ``segment`` lies."""
        name = reader.shards[int(self.shard[segment])]["name"]
        return ByteRange(name, int(self.start[segment]), int(self.stop[segment]))


_COLUMNS = ("shard", "first", "count", "start", "stop", "rows", "positions")


def segments_of(sizes: Sequence[int], segment_bytes: int) -> list[tuple[int, int]]:
    """(first, count) of neighbouring samples of ``sizes`` bytes; a segment closes when it reaches
    ``segment_bytes``."""
    found = []
    first = total = 0
    for number, size in enumerate(sizes):
        total += size
        if total >= segment_bytes:
            found.append((first, number + 1 - first))
            first, total = number + 1, 0
    if first < len(sizes):
        found.append((first, len(sizes) - first))
    return found


def make_sample_plan(
    reader: SampleReader,
    split: str,
    segment_bytes: int,
    count_rows: CountRows,
    key: Sequence[Any],
    cache_folder: Path | None = None,
) -> SamplePlan:
    """The plan of (manifest, split, segment size, ``key``), from its cache file when there is a sound one.

    ``key`` is what ``count_rows`` depends on. Every rank may call this at once: the file is written under a private
    name and renamed; a read-only or remote folder is fine. Raises DamagedDataError when a sidecar cannot be read.
    """
    digest = digest_of([reader.manifest.fingerprint, split, segment_bytes, SEGMENTS, *key])
    table = _from_storage(reader.manifest, digest)
    if table is None and cache_folder is not None:
        table = _parse(_read(cache_folder / plan_name(digest)), digest)
    if table is None:
        rows = []
        for number in range(len(reader.shards)):
            samples = reader.samples(number)
            for begin, length in segments_of([num_bytes(sample) for sample in samples], segment_bytes):
                part = samples[begin : begin + length]
                bounds = range_of(part)
                rows.append((number, begin, length, bounds.start, bounds.stop, *count_rows(part)))
        table = np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS))
        own = [reader.manifest.folder] if reader.manifest.is_local else []
        _store(own + ([cache_folder] if cache_folder is not None else []), digest, table)
    shard, first, count, start, stop, planned, positions = table.T
    return SamplePlan(shard, first, count, start, stop, planned, positions, digest)


def _from_storage(manifest: Manifest, digest: str) -> np.ndarray | None:
    try:
        return _parse(manifest.storage.read(plan_name(digest)), digest)
    except (DamagedDataError, OSError):
        return None  # there is none: it is only a cache


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parse(raw: bytes, digest: str) -> np.ndarray | None:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            table = np.asarray(arrays["segments"], dtype=np.int64)
            sound = str(arrays["digest"]) == digest and table.ndim == 2 and table.shape[1] == len(_COLUMNS)
            return table if sound else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # torn


def _store(folders: list[Path], digest: str, table: np.ndarray) -> None:
    """Write the plan into the first folder that takes it."""
    for folder in folders:
        temporary = folder / f".plan_{digest}.{os.uname().nodename}.{os.getpid()}.npz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(temporary, digest=np.array(digest), segments=table)
            os.replace(temporary, folder / plan_name(digest))
            return
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
