"""What the sources of images, latents and interleaved documents share: order, segments, threads, bad samples.

A row is loaded by one thread of a pool; the rows of a batch are loaded at once and come back in order, so the number
of threads changes nothing but the time. Which row that is, and every random choice in it, is a pure function of
(seed, lane, position).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange
from data_pipeline.keyed import keyed_permutation
from data_pipeline.media.decode import DecodeError, TooLargeError, keyed_words
from data_pipeline.media.plan import SamplePlan
from data_pipeline.media.samples import SampleReader
from data_pipeline.order import LaneOrder, Place, SequentialOrder
from data_pipeline.quarantine import BadData
from data_pipeline.store.manifest import Sample

Opened = TypeVar("Opened")
Row = TypeVar("Row")
Address = tuple[int, int]
Prefetch = Callable[[Sequence[ByteRange]], None]

_MOST_WORKERS = 8
_SUBSTITUTES_TRIED = 64
_KEPT_SUBSTITUTES = 4
_RAISE_LIMITS = "raise max_pixels or max_bytes of the data configuration, or prepare the dataset without it"


@dataclass(frozen=True)
class OpenSegment(Generic[Opened]):
    """A segment during one visit: its samples, its bytes where they are held, the order of its rows and what the
    source made of it."""

    samples: list[Sample]
    payload: tuple[ByteRange, bytes] | None
    row_order: list[int]
    content: Opened


@dataclass(frozen=True)
class RowRequest(Generic[Opened]):
    """One row to load: ``row`` is its number in the segment as packed, ``draw_key`` keys what is random in it."""

    place: Place
    segment: OpenSegment[Opened]
    row: int
    draw_key: tuple[object, ...]


@dataclass(frozen=True)
class LostRow:
    """A row whose segment could not be opened."""

    place: Place
    error: DamagedDataError


class MediaSource(ABC, Generic[Opened, Row]):
    """A ``SampleSource`` and lane source over one split of a sample set; subclasses say what a row is.

    Keeps one open segment per lane that it has read. ``workers`` threads load the rows of a batch (0: the calling
    thread). May be used from several threads.
    """

    def __init__(
        self,
        reader: SampleReader,
        plan: SamplePlan,
        order: LaneOrder | SequentialOrder,
        *,
        seed: int,
        fingerprint: str,
        workers: int | None = None,
        bad_data: BadData | None = None,
        prefetch: Prefetch | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.num_lanes = order.num_lanes
        self.num_samples = order.num_samples if isinstance(order, SequentialOrder) else None
        self.num_bytes: int | None = None
        self.rows_per_epoch = int(plan.rows.sum())
        self._reader, self._plan, self._order, self._seed = reader, plan, order, seed
        self.bad_data = bad_data or BadData()
        self._prefetch = prefetch
        self._open: dict[int, tuple[Place, OpenSegment[Opened]]] = {}  # by lane, with its latest place
        self._substitutes: OrderedDict[int, OpenSegment[Opened]] = OrderedDict()
        self._lock = threading.RLock()
        count = default_workers() if workers is None else workers
        self._pool = ThreadPoolExecutor(count, "decode") if count > 0 else None

    # What a subclass provides.

    @abstractmethod
    def _prepare(self, samples: list[Sample], payload: tuple[ByteRange, bytes] | None, place: Place) -> Opened:
        """What the source keeps of an open segment; raises DamagedDataError."""

    def _allocate(self, count: int) -> np.ndarray | None:
        """Memory [count, ...] that rows may be decoded into, or None."""
        return None

    @abstractmethod
    def _load(self, request: RowRequest[Opened], slot: np.ndarray | None) -> Row:
        """Read and decode one row, in any thread, with its part of what was allocated; raises DamagedDataError."""

    @abstractmethod
    def _collate(self, rows: list[Row], allocated: np.ndarray | None) -> dict[str, np.ndarray]:
        """The arrays of a batch."""

    @abstractmethod
    def _blank(self, row: Row) -> Row:
        """A row of padding that fits beside ``row``."""

    @abstractmethod
    def _origins(self, request: RowRequest[Opened]) -> list[dict[str, Any]]:
        """Provenance of each part of a row."""

    # The protocol.

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Arrays of global samples ``indices``, with ``sample_mask`` bool [B], True for every sample.

        Raises DamagedDataError, FetchError, IndexError (finite sources).
        """
        return self.rows([(index % self.num_lanes, index // self.num_lanes) for index in indices])

    def rows(self, addresses: Sequence[Address]) -> dict[str, np.ndarray]:
        """Arrays of the rows at (lane, position); raises as :meth:`batch`."""
        return self._arrays(addresses, len(addresses))

    def padded_batch(self, indices: Sequence[int], present: int) -> dict[str, np.ndarray]:
        """As :meth:`batch`, but only the first ``present`` rows are samples; the others are blank, and False in
        ``sample_mask``."""
        return self._arrays([(index % self.num_lanes, index // self.num_lanes) for index in indices], present)

    def _arrays(self, addresses: Sequence[Address], present: int) -> dict[str, np.ndarray]:
        # A batch without any sample still needs one to be like.
        wanted = addresses[:present] or [(0, 0)]
        allocated = self._allocate(len(addresses))
        rows, substituted = self._load_all(wanted, allocated)
        if allocated is not None:
            allocated[present:] = 0
        rows = rows[:present] + [self._blank(rows[0])] * (len(addresses) - present)
        arrays = self._collate(rows, allocated)
        arrays["sample_mask"] = np.arange(len(addresses)) < present
        if self.bad_data.substitutes:
            arrays["substituted"] = np.array(substituted + [False] * len(addresses))[: len(addresses)]
            arrays["substituted"] &= arrays["sample_mask"]
        return arrays

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """Where row ``index`` comes from: shard, key, epoch, lane and more, and whether it stands in for a row that
        was lost (``substitutes``)."""
        return self.provenance_at(index % self.num_lanes, index // self.num_lanes)

    def provenance_at(self, lane: int, position: int) -> list[dict[str, Any]]:
        """As :meth:`provenance`, by lane and position."""
        request, substituted = self._sound_request((lane, position))
        place = self._order.locate_in_lane(lane, position)
        return [
            {**origin, "epoch": place.epoch, "lane": place.lane, "substitutes": substituted}
            for origin in self._origins(request)
        ]

    def close(self) -> None:
        """Drop the open segments and end the threads."""
        self._reader.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._substitutes.clear()

    # How rows come about.

    def _load_all(self, addresses: Sequence[Address], allocated: np.ndarray | None) -> tuple[list[Row], list[bool]]:
        with self._lock:
            places = [self._order.locate_in_lane(*address) for address in addresses]
            self._look_ahead(places)
            requests = [self._request(place, address) for place, address in zip(places, addresses, strict=True)]
        slots = [None] * len(addresses) if allocated is None else list(allocated[: len(addresses)])
        run = map if self._pool is None else self._pool.map
        results = list(run(self._try, requests, slots))
        rows: list[Row] = []
        for request, result, slot in zip(requests, results, slots, strict=True):
            rows.append(self._substitute(request, result, slot)[1] if isinstance(result, DamagedDataError) else result)
        return rows, [isinstance(result, DamagedDataError) for result in results]

    def _sound_request(self, address: Address) -> tuple[RowRequest[Opened], bool]:
        """The request behind an address, or the one that stands in for it, and whether it does."""
        with self._lock:
            request = self._request(self._order.locate_in_lane(*address), address)
        if self.bad_data.substitutes or isinstance(request, LostRow):
            slot = self._slot()
            result = self._try(request, slot)
            if isinstance(result, DamagedDataError):
                return self._substitute(request, result, slot)[0], True
        assert isinstance(request, RowRequest)
        return request, False

    def _request(self, place: Place, address: Address) -> RowRequest[Opened] | LostRow:
        if self._is_open(place):
            segment = self._open[place.lane][1]
        else:
            self._open.pop(place.lane, None)
            try:
                segment = self._open_segment(place)
            except DamagedDataError as error:
                return LostRow(place, error)
        self._open[place.lane] = (place, segment)
        return RowRequest(place, segment, segment.row_order[place.row], (self._seed, "row", *address))

    def _is_open(self, place: Place) -> bool:
        held = self._open.get(place.lane)
        return held is not None and (held[0].epoch, held[0].segment) == (place.epoch, place.segment)

    def _open_segment(self, place: Place) -> OpenSegment[Opened]:
        name = self._reader.shards[int(self._plan.shard[place.segment])]["name"]
        if self.bad_data.substitutes and (known := self.bad_data.known(name, None)):
            raise known
        samples = self._plan.samples(self._reader, place.segment)
        wanted = self._plan.byte_range(self._reader, place.segment)
        try:
            whole = self._reader.open_segment(wanted)
        except DamagedDataError:
            whole = None  # its samples are read one by one, so that the sound ones are not lost
        payload = None if whole is None else (wanted, whole)
        count = int(self._plan.rows[place.segment])
        order = np.arange(count)
        if isinstance(self._order, LaneOrder):
            order = keyed_permutation(count, *self._order.segment_key(place), "rows")
        return OpenSegment(samples, payload, order.tolist(), self._prepare(samples, payload, place))

    def _slot(self) -> np.ndarray | None:
        allocated = self._allocate(1)
        return None if allocated is None else np.asarray(allocated[0])

    def _try(self, request: RowRequest[Opened] | LostRow, slot: np.ndarray | None) -> Row | DamagedDataError:
        if isinstance(request, LostRow):
            return request.error
        try:
            return self._load(request, slot)
        except DamagedDataError as error:
            return error

    def _substitute(
        self, request: RowRequest[Opened] | LostRow, error: DamagedDataError, slot: np.ndarray | None
    ) -> tuple[RowRequest[Opened], Row]:
        """A row of another segment instead of the one that ``error`` lost: chosen by key, so always the same."""
        self.bad_data.damaged(error)
        place = request.place
        for attempt in range(_SUBSTITUTES_TRIED):
            key = (self._seed, "substitute", place.epoch, place.segment, place.row, attempt)
            first, second = keyed_words(2, *key)
            segment = first % len(self._plan)
            if segment == place.segment and len(self._plan) > 1:
                segment = (segment + 1) % len(self._plan)
            row = second % int(self._plan.rows[segment])
            try:
                with self._lock:
                    opened = self._opened_substitute(segment)
            except DamagedDataError as another:
                self.bad_data.damaged(another)
                continue
            stand_in = RowRequest(Place(place.lane, 0, segment, row), opened, row, (*key, "row"))
            result = self._try(stand_in, slot)
            if not isinstance(result, DamagedDataError):
                return stand_in, result
            self.bad_data.damaged(result)
        raise DamagedDataError(
            f"{_SUBSTITUTES_TRIED} substitutes in a row are damaged too; the first loss was: {error}",
            shard=error.shard,
            member=error.member,
            byte=error.byte,
        )

    def _opened_substitute(self, segment: int) -> OpenSegment[Opened]:
        if segment not in self._substitutes:
            self._substitutes[segment] = self._open_segment(Place(0, 0, segment, 0))
            while len(self._substitutes) > _KEPT_SUBSTITUTES:
                self._substitutes.popitem(last=False)
        return self._substitutes[segment]

    def _look_ahead(self, places: Sequence[Place]) -> None:
        """Tell the cache which segments these places open now, then each lane's next one, the soonest first."""
        if self._prefetch is None:
            return
        opening = [place for place in places if not self._is_open(place)]
        if not opening:
            return
        latest = {lane: place for lane, (place, _) in self._open.items()} | {place.lane: place for place in places}
        following = []
        for place in latest.values():
            coming = self._order.next_segment(place)
            if coming is not None:
                following.append((coming[1], place.lane, coming[0]))
        following.sort(key=lambda item: item[:2])
        segments = dict.fromkeys(place.segment for place in [*opening, *(place for _, _, place in following)])
        self._prefetch([self._plan.byte_range(self._reader, segment) for segment in segments])

    def _known(self, shard: str, member: str | None) -> DamagedDataError | None:
        return self.bad_data.known(shard, member) if self.bad_data.substitutes else None

    def _members(self, request: RowRequest[Opened], sample: Sample, extensions: Sequence[str]) -> dict[str, memoryview]:
        return self._reader.members(sample, extensions, request.segment.payload, self._known)

    def _decoded(self, sample: Sample, extension: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """What ``decode`` gives; its DecodeError becomes the damage of the member."""
        try:
            return decode()
        except TooLargeError as error:
            raise self._reader.damaged(sample, extension, str(error), _RAISE_LIMITS) from None
        except DecodeError as error:
            raise self._reader.damaged(sample, extension, str(error)) from None


def default_workers() -> int:
    """Threads for decoding: the usable cores, at most eight."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
