"""One process: what is fetched ahead, kept, checked, and raised where."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fault_server as faults
import pytest
from fault_server import FaultServer
from fetch_support import DATA, MemoryStorage, Verifier, cut, ranges

from data_pipeline.errors import DamagedDataError, FetchError, MissingDataError
from data_pipeline.fetch.cache import SegmentCache
from data_pipeline.fetch.storage import ByteRange, Storage, open_storage

PLAN = ranges("a.tar", 1000, 12)
A = "/set/a.tar"
Make = Callable[..., SegmentCache]


@pytest.fixture(params=["folder", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes caches, by default in one folder, and closes them."""
    caches = []

    def make_it(storage: Storage, kind: str = "folder", max_bytes: int = 10**6, **options: object) -> SegmentCache:
        folder = tmp_path / "cache" if kind == "folder" else None
        cache = SegmentCache(storage, folder, max_bytes, **{"reserve_bytes": 0, **options})  # type: ignore[arg-type]
        caches.append(cache)
        return cache

    yield make_it
    for cache in caches:
        cache.close()


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "segments-1" / "entries").iterdir())


class Gate:
    """Called before every read of a storage: tells that it came, and lets it through when open."""

    def __init__(self, is_open: bool = True) -> None:
        self.came: queue.Queue[ByteRange] = queue.Queue()
        self._open = threading.Semaphore(10**6 if is_open else 0)

    def __call__(self, wanted: ByteRange) -> None:
        self.came.put(wanted)
        self._open.acquire()

    def let(self, count: int = 10**6) -> None:
        self._open.release(count)


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Runs ``action`` on a thread; its result or its error comes in the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "segment-prefetch"]


# What is kept


def test_the_second_read_comes_from_the_folder(make: Make) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    for number in range(3):
        cache = make(storage)
        assert [cache.read(wanted) for wanted in PLAN] == [cut(wanted) for wanted in PLAN]
        assert len(storage.reads) == len(PLAN)
        counts = cache.describe()
        assert (counts["hits"], counts["misses"]) == ((len(PLAN), 0) if number else (0, len(PLAN)))


def test_without_a_folder_nothing_is_kept(make: Make) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    cache = make(storage, "memory")
    assert cache.read(PLAN[0]) == cache.read(PLAN[0]) == cut(PLAN[0])
    assert len(storage.reads) == 2


def test_data_sets_do_not_mix(make: Make) -> None:
    one, other = MemoryStorage({"a.tar": DATA}), MemoryStorage({"a.tar": DATA[::-1]})
    make(one, identity="fingerprint 1").read(PLAN[0])
    assert make(other, identity="fingerprint 2").read(PLAN[0]) == DATA[::-1][:1000]
    other.url = "elsewhere"
    assert make(other).read(PLAN[0]) == DATA[::-1][:1000]
    assert make(one, identity="fingerprint 1").read(PLAN[0]) == DATA[:1000]
    assert len(one.reads) == 1


def test_file_names_are_hashes_and_sizes_are_exact(make: Make, tmp_path: Path) -> None:
    name = "deep/er " + "x" * 500
    cache = make(MemoryStorage({name: DATA}))
    for wanted in (ByteRange(name, 0, 5), ByteRange(name, 0, 0), ByteRange(name, 5, 5)):
        assert cache.read(wanted) == cache.read(wanted) == cut(wanted)
    assert all(re.fullmatch("[0-9a-f]{16}-[0-9a-f]{32}", path.name) for path in entries(tmp_path))
    assert [path.stat().st_size for path in entries(tmp_path)].count(8) == 2


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache folder .*file cannot be used: .*What to do"):
        SegmentCache(MemoryStorage({}), tmp_path / "file", 1)
    with pytest.raises(ValueError, match="max_bytes is 0"):
        SegmentCache(MemoryStorage({}), None, 0)


# What is checked


def test_a_flipped_payload_is_fetched_once_more(make: Make, kind: str, server: FaultServer, open_http: Make) -> None:
    server.plan[A].append(faults.flip)
    cache = make(open_http(), kind, verify=Verifier())
    assert cache.read(PLAN[3]) == cut(PLAN[3])
    assert server.count(A) == 2
    assert cache.describe()["refetches"] == 1


@pytest.mark.parametrize("ahead", [True, False])
def test_a_payload_that_stays_wrong_is_the_damage_that_verify_names(
    make: Make, kind: str, ahead: bool, server: FaultServer, open_http: Make
) -> None:
    server.always[A] = faults.flip
    cache = make(open_http(), kind, verify=Verifier())
    if ahead:
        cache.prefetch([PLAN[3]])
    with pytest.raises(DamagedDataError, match=r"^a\.tar: byte 3000: wrong hash$"):
        cache.read(PLAN[3])
    assert server.count(A) == 2
    server.always.clear()
    assert cache.read(PLAN[3]) == cut(PLAN[3]), "nothing wrong was kept"


def _flip(content: bytes) -> bytes:
    return content[:500] + bytes([content[500] ^ 4]) + content[501:]


DAMAGE = {
    "flip": _flip,
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"x",
    "zeroed": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("checked", [True, False])
def test_a_corrupt_entry_is_removed_and_fetched_again(make: Make, tmp_path: Path, damage: str, checked: bool) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    cache = make(storage, verify=Verifier() if checked else None)
    cache.read(PLAN[0])
    (entry,) = entries(tmp_path)
    entry.write_bytes(DAMAGE[damage](entry.read_bytes()))
    assert cache.read(PLAN[0]) == cut(PLAN[0])
    assert cache.read(PLAN[0]) == cut(PLAN[0])
    assert len(storage.reads) == 2
    assert cache.describe()["corrupt_entries"] == 1


def test_a_corrupt_entry_whose_refetch_is_wrong_is_damage(
    make: Make, tmp_path: Path, server: FaultServer, open_http: Make
) -> None:
    cache = make(open_http(), verify=Verifier())
    cache.read(PLAN[0])
    (entry,) = entries(tmp_path)
    entry.write_bytes(_flip(entry.read_bytes()))
    server.always[A] = faults.flip
    with pytest.raises(DamagedDataError, match="wrong hash"):
        cache.read(PLAN[0])
    assert server.count(A) == 2
    assert entries(tmp_path) == []


# What is fetched ahead


def test_exactly_the_plan_is_fetched_in_its_order(make: Make, kind: str) -> None:
    gate = Gate()
    storage = MemoryStorage({"a.tar": DATA, "b.tar": DATA[::-1]}, gate)
    plan = [PLAN[7], ByteRange("b.tar", 5, 9), PLAN[0], PLAN[11], PLAN[1]]
    cache = make(storage, kind, threads=1)
    cache.prefetch(plan)
    assert [gate.came.get() for _ in plan] == plan
    assert [cache.read(wanted) for wanted in plan] == [cut(w, storage.files[w.name]) for w in plan]
    assert storage.reads == plan
    assert cache.describe()["prefetched"] == len(plan)
    assert cache.describe()["misses"] == 0


def test_a_new_plan_drops_what_has_not_started(make: Make, kind: str) -> None:
    gate = Gate(is_open=False)
    storage = MemoryStorage({"a.tar": DATA}, gate)
    cache = make(storage, kind, threads=1)
    cache.prefetch(PLAN[:5])
    gate.came.get()
    cache.prefetch(PLAN[6:9])
    gate.let()
    assert [gate.came.get() for _ in range(3)] == PLAN[6:9]
    cache.close()
    assert storage.reads == [PLAN[0], *PLAN[6:9]]


def test_a_read_waits_for_what_is_in_flight(make: Make, kind: str) -> None:
    gate = Gate(is_open=False)
    storage = MemoryStorage({"a.tar": DATA}, gate)
    cache = make(storage, kind, threads=1)
    cache.prefetch(PLAN[:1])
    gate.came.get()
    readers = [in_thread(lambda: cache.read(PLAN[0])) for _ in range(3)]
    gate.let()
    for thread, results in readers:
        thread.join()
        assert results == [cut(PLAN[0])]
    # In memory a reader that comes after the first has taken the bytes must fetch them again.
    assert len(storage.reads) == 1 or kind == "memory"


def test_a_reader_does_not_wait_behind_the_plan(make: Make, kind: str) -> None:
    gate = Gate(is_open=False)
    storage = MemoryStorage({"a.tar": DATA}, lambda wanted: gate(wanted) if wanted != PLAN[9] else None)
    cache = make(storage, kind, threads=2)
    cache.prefetch(PLAN)
    gate.came.get()
    gate.came.get()
    assert cache.read(PLAN[9]) == cut(PLAN[9])
    gate.let()


def test_memory_is_bounded_and_nothing_is_fetched_twice(make: Make) -> None:
    read: list[ByteRange] = []
    most = [0]

    def before(wanted: ByteRange) -> None:
        # Bytes that are neither read nor about to be: fetched or being fetched, this one included.
        most[0] = max(most[0], sum(w.length for w in storage.reads) - sum(w.length for w in read))

    storage = MemoryStorage({"a.tar": DATA}, before)
    cache = make(storage, "memory", max_bytes=3500, threads=4)
    cache.prefetch(PLAN)
    for wanted in PLAN:
        read.append(wanted)
        assert cache.read(wanted) == cut(wanted)
    assert sorted(storage.reads) == PLAN
    # The range that the reader holds, or takes itself, is beside the three that may wait.
    assert most[0] <= 4000


def test_a_range_larger_than_the_memory_is_fetched_alone(make: Make) -> None:
    gate = Gate()
    cache = make(MemoryStorage({"a.tar": DATA}, gate), "memory", max_bytes=10)
    cache.prefetch(PLAN[:2])
    assert gate.came.get() == PLAN[0]
    assert cache.read(PLAN[0]) == cut(PLAN[0])
    assert gate.came.get() == PLAN[1]


def test_prefetch_stops_where_all_that_is_kept_is_needed_sooner(make: Make, tmp_path: Path) -> None:
    gate = Gate()
    storage = MemoryStorage({"a.tar": DATA}, gate)
    cache = make(storage, max_bytes=3 * 1008, threads=1)
    cache.prefetch(PLAN)
    for wanted in PLAN[:3]:
        assert gate.came.get() == wanted
    for position, wanted in enumerate(PLAN):
        assert cache.read(wanted) == cut(wanted)
        assert len(entries(tmp_path)) <= 4  # three, and the part of a fourth
        if position + 3 < len(PLAN):
            assert gate.came.get() == PLAN[position + 3], "what was read made room for what comes next"
    assert storage.reads == PLAN


@pytest.mark.parametrize(
    "error",
    [
        DamagedDataError("a.tar: bad", shard="a.tar"),
        MissingDataError("u: not found"),
        FetchError("u: HTTP 503", url="u"),
    ],
)
def test_errors_surface_at_the_read_of_their_range(make: Make, kind: str, error: Exception) -> None:
    failures = {PLAN[2]: [error]}
    done: queue.Queue[ByteRange] = queue.Queue()

    def before(wanted: ByteRange) -> None:
        done.put(wanted)
        if failures.get(wanted):
            raise failures[wanted].pop()

    storage = MemoryStorage({"a.tar": DATA}, before)
    cache = make(storage, kind, threads=1)
    cache.prefetch(PLAN[:5])
    for _ in range(5):
        done.get()
    for position in (0, 1, 3, 4):
        assert cache.read(PLAN[position]) == cut(PLAN[position])
    with pytest.raises(type(error)) as caught:
        cache.read(PLAN[2])
    assert caught.value is error
    assert cache.read(PLAN[2]) == cut(PLAN[2]), "a second read tries a second time"


def test_a_forgotten_error_does_not_come_back(make: Make, kind: str) -> None:
    gate = Gate()

    def before(wanted: ByteRange) -> None:
        gate(wanted)
        if len(storage.reads) == 1:
            raise DamagedDataError("bad")

    storage = MemoryStorage({"a.tar": DATA}, before)
    cache = make(storage, kind, threads=1)
    cache.prefetch(PLAN[:2])
    assert [gate.came.get(), gate.came.get()] == PLAN[:2]
    cache.prefetch([])
    assert cache.read(PLAN[0]) == cut(PLAN[0])


# The end


@pytest.mark.parametrize("behaviour", [faults.stall, faults.silent])
def test_close_ends_requests_in_flight_and_joins(
    make: Make, kind: str, server: FaultServer, open_http: Make, behaviour: faults.Behaviour
) -> None:
    server.always[A] = behaviour
    storage = open_http(read_timeout_s=10_000)
    cache = make(storage, kind, threads=3)
    cache.prefetch(PLAN[:5])
    thread, results = in_thread(lambda: cache.read(PLAN[8]))
    for _ in range(4):
        server.arrived.get()
    cache.close()
    thread.join()
    assert "closed" in str(results[0])
    assert prefetch_threads() == []
    server.release.set()
    server.always.clear()
    assert storage.read("a.tar", 0, 5) == DATA[:5], "the storage stays open"


def test_close_wakes_idle_threads_and_a_waiting_reader(make: Make, kind: str) -> None:
    gate = Gate(is_open=False)
    cache = make(MemoryStorage({"a.tar": DATA}, gate), kind, threads=2)
    cache.prefetch(PLAN[:1])
    gate.came.get()
    thread, results = in_thread(lambda: cache.read(PLAN[0]))
    closing, _ = in_thread(cache.close)
    gate.let()
    closing.join()
    thread.join()
    assert results == [cut(PLAN[0])] or "was closed" in str(results[0])
    assert prefetch_threads() == []
    cache.close()
    for call in (lambda: cache.read(PLAN[0]), lambda: cache.prefetch(PLAN)):
        with pytest.raises(ValueError, match="the segment cache was closed"):
            call()


def test_a_forked_child_goes_on_by_itself(make: Make, kind: str, server: FaultServer, open_http: Make) -> None:
    cache = make(open_http(), kind, threads=2)
    cache.prefetch(PLAN)
    assert cache.read(PLAN[0]) == cut(PLAN[0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            cache.prefetch(PLAN[5:])
            if [cache.read(wanted) for wanted in PLAN] == [cut(wanted) for wanted in PLAN]:
                cache.close()
                status = 0
        finally:
            os._exit(status)
    assert [cache.read(wanted) for wanted in PLAN] == [cut(wanted) for wanted in PLAN]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_local_files_are_read_ahead_in_memory(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    cache = make(open_storage(tmp_path), "memory", verify=Verifier())
    cache.prefetch(PLAN)
    assert [cache.read(wanted) for wanted in PLAN] == [cut(wanted) for wanted in PLAN]
    counts = cache.describe()
    assert counts["hits"] + counts["misses"] == len(PLAN)
    assert counts["bytes"] == 12_000
    (tmp_path / "a.tar").write_bytes(_flip(DATA))
    with pytest.raises(DamagedDataError, match="wrong hash"):
        cache.read(PLAN[0])


def test_counters_have_the_same_names_from_the_start(
    make: Make, kind: str, server: FaultServer, open_http: Make
) -> None:
    cache = make(open_http(), kind)
    before = cache.describe()
    cache.read(PLAN[0])
    after = cache.describe()
    assert set(before) == set(after)
    assert set(before.values()) == {0}
    assert after["requests"] == 1
    assert after["bytes"] == 1000
    assert after["wait_s"] > 0
