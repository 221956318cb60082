"""Building text sources: manifest, plan, order and reader put together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.keyed import keyed_permutation
from data_pipeline.order import Addition, LaneOrder, SequentialOrder
from data_pipeline.packing import BEST_FIT
from data_pipeline.plan import SegmentPlan, blocks_per_segment, join_plans, make_plan, segment_starts
from data_pipeline.quarantine import BadData
from data_pipeline.store.blocks import BlockIndex
from data_pipeline.store.manifest import Manifest, digest_of
from data_pipeline.store.reader import BlockReader
from data_pipeline.text_source import TextSource

if TYPE_CHECKING:
    from data_pipeline.fetch.cache import SegmentCache

ORDER = "lanes-2"
REMOTE_THREADS = 16
"""Fetching ahead: enough to hide the latency of an object store."""


@dataclass(frozen=True)
class CacheSettings:
    """The node-local cache of a remote dataset: ``folder`` (None: a private one below the temporary folder) and its
    size."""

    folder: str | None = None
    max_bytes: int = 64 << 30

    def path(self) -> Path:
        """The folder, which all processes of a user on a node share; the default one is made (mode 0700). Raises
        ValueError when it is another user's."""
        if self.folder is not None:
            return Path(self.folder)
        from data_pipeline.fetch.folder import make_private

        root = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
        return make_private(Path(root) / f"pretrain-data-{os.getuid()}")

    def plan_folder(self, manifest: Manifest) -> Path | None:
        """Where plans of the dataset go when they cannot lie in it; None when they can."""
        if manifest.is_local and os.access(manifest.folder, os.W_OK):
            return None
        return self.path()


@dataclass(frozen=True)
class Appended:
    """A later edition of the dataset, and the position of each lane from which on its new shards belong to the
    order."""

    manifest: Manifest
    positions: np.ndarray


def recommended_lanes(manifest: Manifest, num_segments: int) -> int:
    """The manifest's number of lanes, lowered when the split has fewer segments."""
    return max(1, min(int(manifest.content["num_lanes"]), num_segments))


def num_blocks(manifest: Manifest, split: str) -> int:
    """Blocks of a split, from the manifest alone."""
    return sum(shard["blocks"] for shard in manifest.split(split)["shards"])


def train_source(
    manifest: Manifest,
    sequence_length: int,
    num_lanes: int | None,
    seed: int | str,
    split: str = "train",
    *,
    packing: str = BEST_FIT,
    appended: Sequence[Appended] = (),
    reserve_segments: int = 0,
    bad_data: BadData | None = None,
    cache: CacheSettings | None = None,
) -> TextSource:
    """The endless shuffled source of ``split``.

    ``reserve_segments`` segments, chosen by key, are left out of the order and stand in for rows that damage makes
    unreadable. Raises ValueError when there are more lanes than segments, DamagedDataError, FetchError.
    """
    last = appended[-1].manifest if appended else manifest
    blocks = _block_index(last, split, bad_data)
    lanes = recommended_lanes(manifest, num_blocks(manifest, split) - reserve_segments)
    lanes = lanes if num_lanes is None else num_lanes
    cache = cache or CacheSettings()
    reader, segment_cache = _reader(last, blocks, cache)
    size = blocks_per_segment(num_blocks(manifest, split), manifest.content["block_tokens"], sequence_length, lanes)
    plans: list[SegmentPlan] = []
    sizes: list[int] = []
    first = 0
    for edition in [manifest, *(item.manifest for item in appended)]:
        stop = num_blocks(edition, split)
        assert stop >= first, "editions are in the order in which they came"
        if stop > first:
            starts = segment_starts(first, stop, size)
            plans.append(
                make_plan(edition, reader, split, sequence_length, packing, starts, cache.plan_folder(edition))
            )
        sizes.append(sum(len(plan.rows) for plan in plans))
        first = stop
    plan = join_plans(plans)
    if not 0 <= reserve_segments < sizes[0]:
        raise ValueError(
            f"reserve_segments is {reserve_segments}, but the training split has {sizes[0]} segments. "
            "What to do: keep a smaller reserve."
        )
    reserve = sorted(keyed_permutation(sizes[0], seed, split, "reserved")[:reserve_segments].tolist())
    active = np.setdiff1d(np.arange(sizes[-1]), reserve)
    additions = [
        Addition(number - len(reserve), item.positions) for number, item in zip(sizes[1:], appended, strict=True)
    ]
    order = LaneOrder(plan.rows[active], lanes, seed, split, additions, sizes[0] - len(reserve))
    return TextSource(
        order=order,
        plan=plan,
        segments=active,
        reader=reader,
        sequence_length=sequence_length,
        packing=packing,
        fingerprint=digest_of([plan.digest, lanes, seed, len(reserve), ORDER]),
        # Without a reserve, rows of the first edition are repeated: what is appended later must not change the past.
        spares=reserve or range(sizes[0]),
        bad_data=bad_data,
        cache=segment_cache,
    )


def sequential_source(
    manifest: Manifest,
    sequence_length: int,
    split: str = "validation",
    *,
    packing: str = BEST_FIT,
    bad_data: BadData | None = None,
    cache: CacheSettings | None = None,
) -> TextSource:
    """The finite source that holds every target of ``split`` exactly once, in stored order.

    Raises DamagedDataError, FetchError.
    """
    blocks = _block_index(manifest, split, bad_data)
    cache = cache or CacheSettings()
    reader, segment_cache = _reader(manifest, blocks, cache)
    size = blocks_per_segment(4 * len(blocks), manifest.content["block_tokens"], sequence_length, 1)
    starts = segment_starts(0, len(blocks), size)
    plan = make_plan(manifest, reader, split, sequence_length, packing, starts, cache.plan_folder(manifest))
    return TextSource(
        order=SequentialOrder(plan.rows),
        plan=plan,
        segments=np.arange(len(plan.rows)),
        reader=reader,
        sequence_length=sequence_length,
        packing=packing,
        fingerprint=digest_of([plan.digest, "sequential"]),
        num_bytes=manifest.split(split)["bytes"],
        spares=range(len(plan.rows)),
        bad_data=bad_data,
        cache=segment_cache,
    )


def _block_index(manifest: Manifest, split: str, bad_data: BadData | None) -> BlockIndex:
    """The blocks of a split; unless damage is substituted, a shard that is missing or cut short is told at once."""
    substitutes = bad_data is not None and bad_data.substitutes
    blocks = BlockIndex(manifest, split, check_shards=not substitutes)
    if not substitutes:
        blocks.check_sizes()
    return blocks


def _reader(manifest: Manifest, blocks: BlockIndex, settings: CacheSettings) -> tuple[BlockReader, SegmentCache | None]:
    """A reader of ``blocks``; of a remote dataset through the node's cache, which is checked when filled."""
    if manifest.is_local:
        return BlockReader(manifest, blocks), None
    from data_pipeline.fetch.cache import SegmentCache

    plain = BlockReader(manifest, blocks)
    cache = SegmentCache(
        manifest.storage,
        settings.path(),
        settings.max_bytes,
        verify=plain.verify,
        identity=manifest.fingerprint,
        threads=REMOTE_THREADS,
    )
    return BlockReader(manifest, blocks, cache.read), cache
