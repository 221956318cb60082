"""Byte ranges of a storage, fetched ahead of their need: into a cache folder of the node, or into bounded memory.

The reader tells what comes next; threads fetch exactly that, in that order, and wait on a condition when nothing is
left to do or there is no room. What goes wrong in them is raised by ``read`` of the range concerned, nowhere else.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.counters import Counters
from data_pipeline.fetch.folder import CacheFolder, CacheFullError, CorruptEntryError, Slot
from data_pipeline.fetch.remote import RemoteStorage
from data_pipeline.fetch.storage import ByteRange, Storage
from data_pipeline.fetch.threads import renew_in_children


@dataclass(eq=False)
class _Job:
    """A range being fetched, or fetched and not yet read: ``done`` with data, with an error, or with neither when
    the bytes are in the folder or could not be kept."""

    done: bool = False
    data: bytes | None = None
    error: BaseException | None = None


class SegmentCache:
    """Reads ranges of ``storage``, with those of the plan fetched ahead by ``threads`` threads.

    With a ``folder`` (on a disk of the node), ranges are kept there up to ``max_bytes`` and shared with all processes
    that use the folder: each range is downloaded once. Without one, ranges of the plan wait in memory, at most
    ``max_bytes`` of them; that is what local data need. ``verify(range, bytes)`` raises DamagedDataError for wrong
    bytes; it runs on what was downloaded and on what comes from the folder. Wrong bytes are fetched once more.
    ``identity`` names the data set in the folder, best its fingerprint; None takes the storage's URL. ``reserve_bytes``
    of the folder's disk stay free.

    Thread-safe. A forked child starts with the plan, without threads, and with locks of its own; S3 needs the 'spawn'
    or 'forkserver' start method. ``storage`` stays the caller's to close, after this.
    Raises ValueError when the folder cannot be used.
    """

    _jobs: dict[ByteRange, _Job]
    _threads: list[threading.Thread]

    def __init__(
        self,
        storage: Storage,
        folder: Path | None,
        max_bytes: int,
        *,
        verify: Callable[[ByteRange, bytes], None] | None = None,
        identity: str | None = None,
        threads: int = 4,
        reserve_bytes: int = 1 << 30,
    ) -> None:
        if max_bytes < 1 or threads < 0 or reserve_bytes < 0:
            raise ValueError(
                f"cache: max_bytes is {max_bytes}, threads {threads}, reserve_bytes {reserve_bytes}; max_bytes must "
                "be above 0 and none below. What to do: correct them."
            )
        self._storage, self._verify, self._max_bytes = storage, verify, max_bytes
        self._folder = CacheFolder(Path(folder), identity or storage.url, max_bytes, reserve_bytes) if folder else None
        self._num_threads = threads
        self._counters = Counters(
            "hits", "misses", "prefetched", "wait_s", "refetches", "corrupt_entries", "bypassed", "uncached"
        )
        self._plan: list[ByteRange] = []
        self._closed = False
        self.after_fork()
        renew_in_children(self)

    def prefetch(self, upcoming: Sequence[ByteRange]) -> None:
        """Fetch exactly these ranges from now on, in the order of need; returns at once.

        Replaces the earlier plan: what it asked for and has not started is dropped.
        """
        upcoming = list(upcoming)
        in_folder: set[ByteRange] = set()
        if self._folder is not None:
            keys = {wanted: self._folder.key(wanted) for wanted in upcoming}
            self._folder.publish([keys[wanted] for wanted in upcoming])
            in_folder = {wanted for wanted, key in keys.items() if self._folder.has(key)}
        kept = set(upcoming)
        with self._lock:
            self._check_open()
            self._plan = upcoming
            # Kept: what runs, what waits in memory, what failed. What was in the folder may have been evicted.
            self._jobs = {wanted: _Job(done=True) for wanted in in_folder} | {
                wanted: job
                for wanted, job in self._jobs.items()
                if not job.done or (wanted in kept and (job.data is not None or job.error is not None))
            }
            self._no_room = False
            while upcoming and len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._work, name="segment-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._to_do.notify()

    def read(self, wanted: ByteRange) -> bytes:
        """The bytes of ``wanted``, fetched ahead, being fetched (waits) or fetched now.

        Raises what the storage and ``verify`` raise, also when it happened in a thread; reading once more then tries
        once more.
        """
        with self._lock:
            self._check_open()
            job = self._jobs.get(wanted)
            own = job is None
            if job is None:
                job = self._jobs[wanted] = _Job()
            else:
                self._wait_for(job)
                if job.error is not None or job.data is not None:
                    self._leave_plan(wanted)
                    self._forget(wanted, job)
                if job.error is not None:
                    raise job.error
                if job.data is not None:
                    self._counters.add("hits")
                    return job.data
        try:
            data = self._obtain(wanted)
            job.data = data if own else None
            return data
        except BaseException as error:
            job.error = error if own else None
            raise
        finally:
            with self._lock:
                job.done = True
                self._done.notify_all()
                self._forget(wanted, job)

    def describe(self) -> dict[str, float]:
        """Counters for a log: those of the storage, and ``hits``, ``misses``, ``prefetched`` (ranges), ``wait_s``
        (seconds that reads waited), ``refetches`` and ``corrupt_entries``, ``bypassed`` (not kept: all else is needed
        sooner), ``uncached`` (not kept: the disk is full or fails), ``evictions``, ``evicted_bytes``."""
        storage = getattr(self._storage, "counters", None)
        counts = storage.as_dict() if isinstance(storage, Counters) else {}
        folder = self._folder
        evicted = {"evictions": folder.evictions, "evicted_bytes": folder.evicted_bytes} if folder else {}
        return {**counts, **self._counters.as_dict(), "evictions": 0, "evicted_bytes": 0, **evicted}

    def close(self) -> None:
        """End what is in flight and join the threads. Requests over http end at once, others with their timeouts."""
        with self._lock:
            self._closed = True
            self._plan = []
            threads, self._threads = self._threads, []
            self._to_do.notify_all()
            self._done.notify_all()
        if isinstance(self._storage, RemoteStorage):
            self._storage.cancel(self._cancelled)
        for thread in threads:
            thread.join()
        if self._folder is not None:
            self._folder.close()

    def after_fork(self) -> None:
        """A child has no threads, and nothing in flight."""
        self._lock = threading.RLock()
        self._to_do = threading.Condition(self._lock)  # workers wait on it; each that finds work wakes the next
        self._done = threading.Condition(self._lock)  # readers wait on it
        self._cancelled = threading.Event()
        self._jobs = {}
        self._threads = []
        self._no_room = False
        self._counters.after_fork()
        if self._folder is not None:
            self._folder.after_fork()

    # Called with the lock held.

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the segment cache was closed")

    def _wait_for(self, job: _Job) -> None:
        begin = time.monotonic()
        self._done.wait_for(lambda: job.done or self._closed)
        self._counters.add("wait_s", time.monotonic() - begin)
        if not job.done:
            self._check_open()

    def _forget(self, wanted: ByteRange, job: _Job) -> None:
        if self._jobs.get(wanted) is job:
            del self._jobs[wanted]
        self._no_room = False
        self._to_do.notify()

    def _next(self) -> ByteRange | None:
        """The next range of the plan to start on, None when there is nothing to do or no room for it."""
        if self._no_room:
            return None
        wanted = next((wanted for wanted in self._plan if wanted not in self._jobs), None)
        if wanted is not None and self._folder is None:
            # What is being fetched takes room from its start; one range is always allowed.
            held = sum(held.length for held, job in self._jobs.items() if job.error is None)
            if held and held + wanted.length > self._max_bytes:
                return None
        return wanted

    # Called with or without it.

    def _leave_plan(self, wanted: ByteRange) -> None:
        with self._lock:
            if wanted in self._plan:
                self._plan.remove(wanted)
                if self._folder is not None:
                    self._folder.passed(self._folder.key(wanted))

    # Called without it.

    def _work(self) -> None:
        while True:
            with self._lock:
                wanted = self._next()
                while wanted is None and not self._closed:
                    self._to_do.wait()
                    wanted = self._next()
                if wanted is None or self._closed:
                    return
                job = self._jobs[wanted] = _Job()
                if self._next() is not None:
                    self._to_do.notify()
            self._fetch_ahead(wanted, job)
            del job  # while this thread waits, it must not keep the bytes alive

    def _fetch_ahead(self, wanted: ByteRange, job: _Job) -> None:
        room = True
        try:
            if self._folder is None:
                job.data = self._download(wanted, refetch=True)
                self._counters.add("prefetched")
            else:
                room = self._fetch_into(self._folder, wanted)
        except BaseException as error:  # raised by read of this range
            job.error = error
        with self._lock:
            job.done = True
            if not room:
                self._no_room = True  # until something is read or the plan changes
            unwanted = job.error is None and wanted not in self._plan
            if (not room or unwanted) and self._jobs.get(wanted) is job:
                del self._jobs[wanted]
            self._done.notify_all()

    def _fetch_into(self, folder: CacheFolder, wanted: ByteRange) -> bool:
        """Make ``wanted`` an entry, unless it is one or another process is at it; False when there is no room."""
        key = folder.key(wanted)
        if folder.has(key):
            return True
        with contextlib.ExitStack() as stack:
            try:
                slot = stack.enter_context(folder.hold(key, wait=False))
                if slot is None or folder.has(key):
                    return True
                if not slot.make_room(wanted.length):
                    return False
            except (CacheFullError, OSError):
                return False
            data = self._download(wanted, refetch=True)
            if self._keep(slot, data):
                self._counters.add("prefetched")
                return True
            return False

    def _obtain(self, wanted: ByteRange) -> bytes:
        """The bytes from the folder or the storage, on the reader's thread."""
        begin = time.monotonic()
        try:
            if self._folder is None:
                self._leave_plan(wanted)
                self._counters.add("misses")
                return self._download(wanted, refetch=True)
            return self._obtain_through(self._folder, wanted)
        finally:
            self._counters.add("wait_s", time.monotonic() - begin)

    def _obtain_through(self, folder: CacheFolder, wanted: ByteRange) -> bytes:
        key = folder.key(wanted)
        try:
            data, sound = self._load(folder, key, wanted)
        finally:
            self._leave_plan(wanted)  # not sooner: its place in the plan keeps the entry from eviction
        if data is not None:
            return data
        with contextlib.ExitStack() as stack:
            try:
                slot = stack.enter_context(folder.hold(key, wait=True))
            except OSError:
                slot = None
            # Another process may have fetched it while this one waited.
            data, still_sound = self._load(folder, key, wanted)
            if data is not None:
                return data
            self._counters.add("misses")
            room = self._has_room(slot, wanted)
            data = self._download(wanted, refetch=sound and still_sound)
            if room and slot is not None:
                self._keep(slot, data)
            return data

    def _load(self, folder: CacheFolder, key: str, wanted: ByteRange) -> tuple[bytes | None, bool]:
        """The verified bytes of an entry or None, and whether the entry was not corrupt. A corrupt one is removed."""
        try:
            data = folder.load(key, wanted.length, check=self._verify is None)
            if data is not None:
                if self._verify is not None:
                    self._verify(wanted, data)
                self._counters.add("hits")
            return data, True
        except (CorruptEntryError, DamagedDataError):
            folder.discard(key)
            self._counters.add("corrupt_entries")
            return None, False

    def _has_room(self, slot: Slot | None, wanted: ByteRange) -> bool:
        """Room for ``wanted`` was made; without it the reader gets the bytes and nothing is kept."""
        try:
            if slot is not None:
                room = slot.make_room(wanted.length)
                self._counters.add("bypassed", 0 if room else 1)
                return room
        except (CacheFullError, OSError):
            pass
        self._counters.add("uncached")
        return False

    def _keep(self, slot: Slot, data: bytes) -> bool:
        try:
            slot.keep(data)
        except OSError:
            self._counters.add("uncached")
            return False
        return True

    def _download(self, wanted: ByteRange, refetch: bool) -> bytes:
        """Verified bytes from the storage; wrong ones are fetched once more when ``refetch``."""
        data = self._read_storage(wanted)
        if self._verify is None:
            return data
        try:
            self._verify(wanted, data)
        except DamagedDataError:
            if not refetch:
                raise
            self._counters.add("refetches")
            data = self._read_storage(wanted)
            self._verify(wanted, data)
        return data

    def _read_storage(self, wanted: ByteRange) -> bytes:
        if isinstance(self._storage, RemoteStorage):
            return self._storage.read(wanted.name, wanted.start, wanted.length, cancelled=self._cancelled)
        return self._storage.read(wanted.name, wanted.start, wanted.length)
