"""The plan: how blocks form segments and how many rows each segment packs to.

A plan is a small file, cheap to use and cached: beside the manifest where that can be written, else in the cache
folder.
``pretrain data plan`` makes it beforehand, so that a dataset in an object store carries its plan along.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.packing import count_rows
from data_pipeline.store.manifest import Manifest, digest_of
from data_pipeline.store.reader import BlockReader

# Best-fit packing wastes almost nothing once its window holds about this many rows.
_WINDOW_ROWS = 512
# Segments per lane below which neighbouring samples of a lane would come from too few places.
_SEGMENTS_PER_LANE = 4


def blocks_per_segment(num_blocks: int, block_tokens: int, sequence_length: int, num_lanes: int) -> int:
    """Blocks in one segment: a packing window of 512 rows, but never fewer than four segments a lane."""
    window = -(-_WINDOW_ROWS * sequence_length // block_tokens)
    return max(1, min(window, num_blocks // (_SEGMENTS_PER_LANE * num_lanes)))


@dataclass(frozen=True)
class SegmentPlan:
    """Segment s is blocks ``starts[s]`` up to ``starts[s + 1]``, packs to ``rows[s]`` rows and holds ``positions[s]``
    positions (targets)."""

    starts: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    digest: str

    def blocks(self, segment: int) -> range:
        """Blocks of ``segment``."""
        return range(int(self.starts[segment]), int(self.starts[segment + 1]))

    def fill(self, sequence_length: int) -> float:
        """Share of the positions in all rows that hold a target."""
        return float(self.positions.sum() / (self.rows.sum() * sequence_length))


def segment_starts(first: int, stop: int, size: int) -> np.ndarray:
    """Where segments of ``size`` blocks begin among blocks ``first`` up to ``stop``, with ``stop`` appended."""
    return np.append(np.arange(first, stop, size), stop)


def join_plans(plans: Sequence[SegmentPlan]) -> SegmentPlan:
    """One plan of the plans of neighbouring blocks."""
    starts = np.concatenate([plan.starts[:-1] for plan in plans] + [plans[-1].starts[-1:]])
    rows = np.concatenate([plan.rows for plan in plans])
    return SegmentPlan(starts, rows, np.concatenate([plan.positions for plan in plans]), plans[0].digest)


def make_plan(
    manifest: Manifest,
    reader: BlockReader,
    split: str,
    sequence_length: int,
    packing: str,
    starts: np.ndarray,
    cache_folder: Path | None = None,
) -> SegmentPlan:
    """The plan of (manifest, split, sequence length, packing, segments), from its file when there is a sound one.

    Every rank may call this at once: on one host the first makes the file and the others wait for it; the file is
    written under a private name and renamed; a read-only folder is fine.

    Raises DamagedDataError when a block's offsets cannot be read.
    """
    window = [int(starts[0]), int(starts[-1]), int(starts[1] - starts[0])]
    digest = digest_of([manifest.fingerprint, split, sequence_length, window, packing])
    plan = _from_storage(manifest, starts, digest)
    if plan is not None:
        return plan
    with _turn(_folders(manifest, cache_folder), digest) as path:
        plan = _parse(_read(path), starts, digest) if path is not None else None
        if plan is None:
            plan = _compute(reader, sequence_length, packing, starts, digest)
            if path is not None:
                _store(path, plan)
    return plan


def plan_name(digest: str) -> str:
    """File name of a plan."""
    return f"plan_{digest}.npz"


def _compute(reader: BlockReader, sequence_length: int, packing: str, starts: np.ndarray, digest: str) -> SegmentPlan:
    rows, positions = [], []
    for first, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        lengths = np.concatenate([reader.lengths(block) for block in range(first, stop)])
        rows.append(count_rows(lengths, sequence_length, packing))
        positions.append(int(lengths.sum()) - len(lengths))
    return SegmentPlan(starts, np.array(rows, dtype=np.int64), np.array(positions, dtype=np.int64), digest)


def _folders(manifest: Manifest, cache_folder: Path | None) -> list[Path]:
    own = [manifest.folder] if manifest.is_local else []
    return own + ([cache_folder] if cache_folder is not None else [])


def _from_storage(manifest: Manifest, starts: np.ndarray, digest: str) -> SegmentPlan | None:
    try:
        return _parse(manifest.storage.read(plan_name(digest)), starts, digest)
    except (DamagedDataError, OSError):
        return None  # there is none: it is only a cache


@contextlib.contextmanager
def _turn(folders: list[Path], digest: str) -> Iterator[Path | None]:
    """Hold a lock on the first of ``folders`` that can be written; gives the plan's path there, or None."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / f".{plan_name(digest)}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError:
            continue
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the work is done more than once
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder / plan_name(digest)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(folder / f".{plan_name(digest)}.lock")
            os.close(descriptor)
        return
    yield None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parse(raw: bytes, starts: np.ndarray, digest: str) -> SegmentPlan | None:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            if str(arrays["digest"]) != digest or arrays["rows"].shape != (len(starts) - 1,):
                return None
            return SegmentPlan(starts, arrays["rows"].astype(np.int64), arrays["positions"].astype(np.int64), digest)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # torn, or of an earlier version


def _store(path: Path, plan: SegmentPlan) -> None:
    temporary = path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}.npz")
    try:
        np.savez(temporary, digest=np.array(plan.digest), rows=plan.rows, positions=plan.positions)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
