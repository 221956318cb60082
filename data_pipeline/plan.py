"""The plan: how blocks form segments and how many rows each segment packs to. Cheap, cached beside the
manifest."""

from __future__ import annotations

import contextlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.packing import PACKING, count_rows
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
    """Segment s is blocks ``[s * blocks_per_segment, (s + 1) * blocks_per_segment)`` and packs to ``rows[s]``
    rows."""

    blocks_per_segment: int
    rows: np.ndarray
    digest: str

    def block_range(self, segment: int, num_blocks: int) -> range:
        """Blocks of ``segment``; the last one may be short."""
        first = segment * self.blocks_per_segment
        return range(first, min(first + self.blocks_per_segment, num_blocks))


def make_plan(
    manifest: Manifest, reader: BlockReader, split: str, sequence_length: int, blocks_per_segment: int
) -> SegmentPlan:
    """The plan of (manifest, split, sequence length, packing), from its cache file when there is a sound one.

    Every rank may call this at once: the file is written under a private name and renamed; a read-only folder
    is fine.
    Raises DamagedDataError when a block's offsets cannot be read.
    """
    digest = digest_of([manifest.fingerprint, split, sequence_length, blocks_per_segment, PACKING])
    num_segments = -(-len(reader.blocks) // blocks_per_segment)
    path = manifest.folder / f"plan_{digest}.npz"
    rows = _load(path, digest, num_segments)
    if rows is None:
        plan = SegmentPlan(blocks_per_segment, np.empty(0, dtype=np.int64), digest)
        rows = np.array(
            [
                count_rows(
                    np.concatenate([reader.lengths(b) for b in plan.block_range(s, len(reader.blocks))]),
                    sequence_length,
                )
                for s in range(num_segments)
            ],
            dtype=np.int64,
        )
        _store(path, digest, rows)
    return SegmentPlan(blocks_per_segment, rows, digest)


def _load(path: Path, digest: str, num_segments: int) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["digest"]) != digest or arrays["rows"].shape != (num_segments,):
                return None
            return np.asarray(arrays["rows"], dtype=np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or torn: it is only a cache


def _store(path: Path, digest: str, rows: np.ndarray) -> None:
    temporary = path.with_name(f".{path.stem}.{os.uname().nodename}.{os.getpid()}.npz")
    try:
        np.savez(temporary, digest=np.array(digest), rows=rows)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
