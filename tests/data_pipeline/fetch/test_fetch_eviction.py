"""The cap, what leaves first, a full disk, and what killed processes left behind."""

from __future__ import annotations

import errno
import fcntl
import functools
import math
import os
import random
import tempfile
import threading
from pathlib import Path

import pytest
from fetch_support import DATA, MemoryStorage, cut, ranges, used_at_one_moment, used_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.fetch import folder as folder_module
from data_pipeline.fetch.cache import SegmentCache
from data_pipeline.fetch.eviction import Entry, Needs, choose_victims
from data_pipeline.fetch.folder import CacheFolder
from data_pipeline.fetch.storage import ByteRange

RANGES = ranges("a.tar", 992, 12)  # an entry is 1000 bytes
ENTRY = 1000


def kept(folder: Path, cache: CacheFolder, candidates: list[ByteRange] = RANGES) -> list[int]:
    return [i for i, wanted in enumerate(candidates) if cache.has(cache.key(wanted))]


def fewest_downloads(requests: list[int], capacity: int) -> int:
    """What no strategy can beat, by trying them all."""

    @functools.cache
    def best(position: int, cached: frozenset[int]) -> int:
        if position == len(requests):
            return 0
        wanted = requests[position]
        if wanted in cached:
            return best(position + 1, cached)
        choices = [cached]  # not kept
        if len(cached) < capacity:
            choices.append(cached | {wanted})
        choices += [(cached - {victim}) | {wanted} for victim in cached]
        return 1 + min(best(position + 1, choice) for choice in choices)

    return best(0, frozenset())


@given(st.lists(st.integers(0, 4), max_size=14), st.integers(1, 3))
@settings(max_examples=40)
def test_a_known_plan_is_served_with_the_fewest_downloads_there_can_be(requests: list[int], capacity: int) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    with tempfile.TemporaryDirectory() as folder:
        cache = SegmentCache(storage, Path(folder), capacity * ENTRY, threads=0, reserve_bytes=0)
        cache.prefetch([RANGES[i] for i in requests])
        for i in requests:
            assert cache.read(RANGES[i]) == cut(RANGES[i])
            assert used_at_one_moment(Path(folder)) <= capacity * ENTRY
        cache.close()
    assert len(storage.reads) == fewest_downloads(requests, capacity)


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900), st.booleans()), max_size=25),
    st.integers(1, 4000),
    st.integers(0, 3),
)
@settings(max_examples=40)
def test_the_cap_holds_for_any_sizes_and_bytes_are_right(
    reads: list[tuple[int, int, bool]], cap: int, threads: int
) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    wanted = [ByteRange("a.tar", start, start + length) for start, length, _ in reads]
    with tempfile.TemporaryDirectory() as folder:
        cache = SegmentCache(storage, Path(folder), cap, threads=threads, reserve_bytes=0)
        for position, (_, _, plan) in enumerate(reads):
            if plan:
                cache.prefetch(wanted[position : position + 6])
            assert cache.read(wanted[position]) == cut(wanted[position])
            assert used_at_one_moment(Path(folder)) <= cap
        cache.close()
        assert not list(Path(folder).glob("segments-1/entries/*.part"))
        assert not list(Path(folder).glob("segments-1/plans/*"))


NEEDS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 20))


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 9), st.integers(0, 99)), unique_by=lambda e: e[0]),
    NEEDS,
    st.integers(1, 60),
    st.sampled_from("abcdefghX"),
)
def test_victims_are_the_farthest_and_no_more_than_needed(
    files: list[tuple[str, int, int]], distances: dict[str, int], required: int, key: str
) -> None:
    entries = [Entry("live" if name < "e" else "dead", name, size, used) for name, size, used in files if name != key]
    needs = Needs(distances, frozenset({"live"}))
    victims = choose_victims(entries, needs, key, required)

    def distance(name: str) -> float:
        return distances.get(name, math.inf)

    rest = [entry for entry in entries if entry not in victims]
    freed = sum(victim.size for victim in victims)
    assert all(distance(victim.key) >= distance(other.key) for victim in victims for other in rest)
    assert all(distance(v.key) > distance(key) or (v.dataset == "dead" and key not in distances) for v in victims)
    if freed >= required:
        assert freed - victims[-1].size < required
    else:  # all that may go goes
        assert all(distance(e.key) <= distance(key) for e in rest)


def test_beyond_the_plans_the_latest_read_goes_first_and_dead_data_sets_by_age() -> None:
    entries = [
        Entry("live", "old", 1, used_ns=1),
        Entry("live", "new", 1, used_ns=9),
        Entry("live", "soon", 1, used_ns=5),
        Entry("live", "later", 1, used_ns=5),
        Entry("dead", "gone-old", 1, used_ns=2),
        Entry("dead", "gone-new", 1, used_ns=8),
    ]
    needs = Needs({"soon": 0, "later": 7, "wanted": 3}, frozenset({"live"}))
    order = [victim.key for victim in choose_victims(entries, needs, "wanted", 99)]
    assert order == ["gone-old", "gone-new", "new", "old", "later"]
    # What nobody is known to need does not push out what an epoch will still come to.
    assert [v.key for v in choose_victims(entries, needs, "unknown", 99)] == ["gone-old", "gone-new"]
    # More than required goes only where no need is known.
    assert [v.key for v in choose_victims(entries, needs, "wanted", 1, slack=3)] == [
        "gone-old",
        "gone-new",
        "new",
        "old",
    ]


def test_a_second_epoch_finds_what_fitted(tmp_path: Path) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    cache = SegmentCache(storage, tmp_path, 6 * ENTRY, threads=0, reserve_bytes=0)
    for _ in range(3):
        for wanted in RANGES:  # twice as much as fits; least-recently-used would find nothing
            cache.read(wanted)
    assert cache.describe()["hits"] == 2 * 6
    cache.close()


def test_the_needs_of_other_processes_count_while_they_live(tmp_path: Path) -> None:
    storage = MemoryStorage({"a.tar": DATA})

    def open_cache() -> SegmentCache:
        return SegmentCache(storage, tmp_path, 2 * ENTRY, threads=0, reserve_bytes=0)

    mine, other, looker = open_cache(), open_cache(), CacheFolder(tmp_path, "memory", 2 * ENTRY, 0)
    other.prefetch([RANGES[1]])  # a lock of its own, as another process would hold
    mine.prefetch([RANGES[0], RANGES[1], RANGES[2], RANGES[3], RANGES[1]])
    mine.read(RANGES[0])
    mine.read(RANGES[1])
    mine.prefetch([RANGES[2], RANGES[3]])
    mine.read(RANGES[2])
    assert kept(tmp_path, looker) == [1, 2] or kept(tmp_path, looker) == [0, 1]
    assert 1 in kept(tmp_path, looker)
    other.close()  # from now on nobody needs range 1
    mine.prefetch([RANGES[4], RANGES[5], RANGES[4], RANGES[5]])
    mine.read(RANGES[4])
    mine.read(RANGES[5])
    assert kept(tmp_path, looker) == [4, 5]
    mine.close()


def test_entries_in_use_stay_readable(tmp_path: Path) -> None:
    """Readers of two caches with room for three entries, each evicting under the other."""
    storage, wrong = MemoryStorage({"a.tar": DATA}), []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        cache = SegmentCache(storage, tmp_path, 3 * ENTRY, threads=2, reserve_bytes=0)
        for _ in range(40):
            plan = draw.choices(RANGES, k=4)
            cache.prefetch(plan)
            wrong.extend(wanted for wanted in plan if cache.read(wanted) != cut(wanted))
        cache.close()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert used_bytes(tmp_path) <= 3 * ENTRY


# A full disk


class Disk:
    """Refuses to give more than ``room`` bytes to the entries of ``folder``."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room = folder, room

    def allocate(self, descriptor: int, size: int) -> None:
        if used_bytes(self.folder) + size > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, size)


def test_a_full_disk_evicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_allocate", Disk(tmp_path, 3 * ENTRY).allocate)
    storage = MemoryStorage({"a.tar": DATA})
    cache = SegmentCache(storage, tmp_path, 10 * ENTRY, threads=0, reserve_bytes=0)
    for wanted in RANGES[:3]:
        cache.read(wanted)
    cache.prefetch([RANGES[3], RANGES[0], RANGES[3]])
    assert cache.read(RANGES[3]) == cut(RANGES[3])
    assert cache.describe()["evictions"] == 1
    assert cache.describe()["uncached"] == 0
    looker = CacheFolder(tmp_path, "memory", 1, 0)
    assert {0, 3} < set(kept(tmp_path, looker))
    cache.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_full_disk_with_nothing_to_evict_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(folder_module, "_allocate", Disk(tmp_path, 5).allocate)
    cache = SegmentCache(MemoryStorage({"a.tar": DATA}), tmp_path, 10**9, threads=threads, reserve_bytes=0)
    cache.prefetch(RANGES)
    assert [cache.read(wanted) for wanted in RANGES] == [cut(wanted) for wanted in RANGES]
    assert cache.describe()["uncached"] == len(RANGES)
    cache.close()
    assert used_bytes(tmp_path) == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_a_disk_that_fails_while_writing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def write(descriptor: int, data: bytes, position: int) -> None:
        os.pwrite(descriptor, data[:10], position)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module, "_write_all", write)
    cache = SegmentCache(MemoryStorage({"a.tar": DATA}), tmp_path, 10**9, threads=threads, reserve_bytes=0)
    cache.prefetch(RANGES)
    assert [cache.read(wanted) for wanted in RANGES] == [cut(wanted) for wanted in RANGES]
    assert cache.describe()["uncached"] >= len(RANGES)
    cache.close()
    assert used_bytes(tmp_path) == 0


def test_the_reserve_of_the_disk_is_left_free(tmp_path: Path) -> None:
    cache = SegmentCache(MemoryStorage({"a.tar": DATA}), tmp_path, 10**9, threads=0, reserve_bytes=1 << 60)
    assert cache.read(RANGES[0]) == cut(RANGES[0])
    assert used_bytes(tmp_path) == 0
    assert cache.describe()["uncached"] == 1
    cache.close()


def test_a_folder_that_vanishes_streams(tmp_path: Path) -> None:
    cache = SegmentCache(MemoryStorage({"a.tar": DATA}), tmp_path, 10**9, threads=1, reserve_bytes=0)
    (tmp_path / "segments-1" / "entries").rename(tmp_path / "elsewhere")
    cache.prefetch(RANGES)
    assert [cache.read(wanted) for wanted in RANGES] == [cut(wanted) for wanted in RANGES]
    cache.close()


# What killed processes left behind


def test_stale_parts_are_swept_at_start_and_living_ones_are_not(tmp_path: Path) -> None:
    first = CacheFolder(tmp_path, "memory", 10**6, 0)
    entries = tmp_path / "segments-1" / "entries"
    stale, living = (entries / (first.key(wanted) + ".part") for wanted in RANGES[:2])
    for path in (stale, living):
        path.write_bytes(b"half")
    with open(living, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        CacheFolder(tmp_path, "memory", 10**6, 0)
        assert list(entries.iterdir()) == [living]
    CacheFolder(tmp_path, "another data set", 10**6, 0)
    assert list(entries.iterdir()) == []


def test_a_stale_part_is_taken_over(tmp_path: Path) -> None:
    cache = SegmentCache(MemoryStorage({"a.tar": DATA}), tmp_path, 10**6, threads=0, reserve_bytes=0)
    key = CacheFolder(tmp_path, "memory", 10**6, 0).key(RANGES[0])
    (tmp_path / "segments-1" / "entries" / f"{key}.part").write_bytes(b"x" * 5000)
    assert cache.read(RANGES[0]) == cache.read(RANGES[0]) == cut(RANGES[0])
    assert used_bytes(tmp_path) == ENTRY
    cache.close()


def test_a_plan_without_its_process_does_not_count(tmp_path: Path) -> None:
    storage = MemoryStorage({"a.tar": DATA})
    cache = SegmentCache(storage, tmp_path, ENTRY, threads=0, reserve_bytes=0)
    looker = CacheFolder(tmp_path, "memory", ENTRY, 0)
    cache.read(RANGES[0])
    left = tmp_path / "segments-1" / "plans" / "1-killed"
    left.write_text(f"{looker.key(RANGES[0])[:16]}\n{looker.key(RANGES[0])}")
    cache.prefetch([RANGES[1], RANGES[1]])
    cache.read(RANGES[1])
    assert kept(tmp_path, looker) == [1]
    assert not left.exists()
    cache.close()
