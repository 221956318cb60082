"""Building sources of media: manifest, plan, order and reader put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.media.media_source import MediaSource
from data_pipeline.media.packing import SPAN_PACKING, SpanLayout, cut_documents
from data_pipeline.media.plan import CountRows, make_sample_plan
from data_pipeline.media.samples import SampleReader
from data_pipeline.order import LaneOrder, SequentialOrder
from data_pipeline.packing import assign_rows
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import Manifest, Sample, digest_of
from data_pipeline.text_build import REMOTE_THREADS, CacheSettings

ORDER = "media-lanes-1"


@dataclass(frozen=True, kw_only=True)
class Access:
    """How samples are read: threads that decode (None: the usable cores, at most eight), the policy for damage, and
    the node's cache of a remote dataset."""

    workers: int | None = None
    bad_data: BadData | None = None
    cache: CacheSettings | None = None


def media_source(
    make: Callable[..., MediaSource[Any, Any]],
    manifest: Manifest,
    split: str,
    *,
    seed: int,
    num_lanes: int | None,
    segment_bytes: int | None,
    access: Access,
    options: Mapping[str, Any],
    count_rows: CountRows | None = None,
    plan_key: Sequence[Any] = (),
    row_key: Any = None,
) -> MediaSource[Any, Any]:
    """A source of ``split``: endless and shuffled for ``train``, else each row once in stored order.

    ``make`` is the class of the source, ``options`` its own arguments. ``plan_key`` is what ``count_rows``
    depends on, ``row_key`` (JSON) what else the arrays depend on; both become part of the fingerprint.
    Raises ValueError when there are more lanes than segments, DamagedDataError, FetchError.
    """
    size = segment_bytes or int(manifest.content["segment_bytes"])
    settings = access.cache or CacheSettings()
    reader, prefetch = SampleReader(manifest, split), None
    if not manifest.is_local:
        from data_pipeline.fetch.cache import SegmentCache

        cache = SegmentCache(
            manifest.storage,
            settings.path(),
            settings.max_bytes,
            verify=reader.verify,
            identity=manifest.fingerprint,
            threads=REMOTE_THREADS,
        )
        reader, prefetch = SampleReader(manifest, split, cache.read, cache.close), cache.prefetch
    plan = make_sample_plan(reader, split, size, count_rows or _one_each, plan_key, settings.plan_folder(manifest))
    order: LaneOrder | SequentialOrder
    if split == "train":
        lanes = max(1, min(int(manifest.content["num_lanes"]), len(plan))) if num_lanes is None else num_lanes
        order = LaneOrder(plan.rows, lanes, seed, split)
        fingerprint = digest_of([plan.digest, lanes, seed, ORDER, row_key])
    else:
        order = SequentialOrder(plan.rows)
        fingerprint = digest_of([plan.digest, "sequential", row_key])
    return make(
        reader,
        plan,
        order,
        seed=seed,
        fingerprint=fingerprint,
        workers=access.workers,
        bad_data=access.bad_data,
        prefetch=prefetch,
        **options,
    )


@dataclass(frozen=True)
class SpanPlan:
    """How interleaved documents become rows."""

    layout: SpanLayout
    sequence_length: int

    @property
    def key(self) -> list[Any]:
        """What the plan depends on, as JSON."""
        layout = self.layout
        widths = [layout.image_tokens, layout.speech_tokens_per_second]
        markers = [marker is not None for kind in ("image", "speech") for marker in layout.markers(kind)]
        return [self.sequence_length, widths, markers, SPAN_PACKING]

    def count_rows(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Rows of a segment, and positions with a target in them."""
        spans = [sample.attributes["spans"] for sample in samples]
        lengths = cut_documents(spans, self.layout, self.sequence_length)[2]
        return assign_rows(lengths, self.sequence_length)[1], int(lengths.sum())


def _one_each(samples: Sequence[Sample]) -> tuple[int, int]:
    return len(samples), len(samples)
