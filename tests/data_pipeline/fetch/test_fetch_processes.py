"""Several processes on one cache folder: each range is downloaded once, also when one of them is killed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import fault_server as faults
import pytest
from fault_server import FaultServer
from fetch_support import Verifier, cut, ranges, used_at_one_moment

from data_pipeline.errors import DamagedDataError, FetchError
from data_pipeline.fetch.cache import SegmentCache
from data_pipeline.fetch.settings import FetchSettings
from data_pipeline.fetch.storage import open_storage

SPAWN = multiprocessing.get_context("spawn")
A = "/set/a.tar"
PLAN = ranges("a.tar", 5000, 8)


def serve(pipe: Connection, url: str, folder: Path, max_bytes: int) -> None:
    """A rank: reads the ranges that come through the pipe, None ends it. Answers with bytes or the error's text."""
    storage = open_storage(url, FetchSettings(read_timeout_s=60, first_wait_s=0, attempts=3))
    cache = SegmentCache(storage, folder, max_bytes, verify=Verifier(), reserve_bytes=0)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, list):
            cache.prefetch(asked)
            pipe.send("planned")
            continue
        try:
            pipe.send(cache.read(asked))
        except (DamagedDataError, FetchError) as error:
            pipe.send(f"{type(error).__name__} {error}")
    pipe.send(cache.describe())
    cache.close()
    storage.close()


class Rank:
    def __init__(self, url: str, folder: Path, max_bytes: int) -> None:
        self.pipe, end = SPAWN.Pipe()
        self.process: BaseProcess = SPAWN.Process(target=serve, args=(end, url, folder, max_bytes), daemon=True)
        self.process.start()
        end.close()

    def finish(self) -> dict[str, float]:
        self.pipe.send(None)
        counts: dict[str, float] = self.pipe.recv()
        self.process.join()
        return counts


@pytest.fixture
def ranks(server: FaultServer, tmp_path: Path) -> Iterator[list[Rank]]:
    """Two processes on one folder."""
    both = [Rank(f"{server.url}/set", tmp_path / "cache", 10**6) for _ in range(2)]
    for rank in both:
        assert rank.pipe.recv() == "ready"
    yield both
    server.release.set()
    for rank in both:
        rank.process.kill()
        rank.process.join()


def files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "segments-1" / "entries").iterdir())


def test_two_processes_download_each_range_once(ranks: list[Rank], server: FaultServer, tmp_path: Path) -> None:
    for rank in ranks:
        rank.pipe.send(PLAN)
    for rank in ranks:
        assert rank.pipe.recv() == "planned"
    for wanted in PLAN:
        for rank in ranks:
            rank.pipe.send(wanted)
        for rank in ranks:
            assert rank.pipe.recv() == cut(wanted)
    counts = [rank.finish() for rank in ranks]
    assert server.count(A) == len(PLAN) == sum(count["requests"] for count in counts)
    assert sum(count["prefetched"] + count["misses"] for count in counts) == len(PLAN)
    assert [path.suffix for path in files(tmp_path)] == [""] * len(PLAN)


def test_the_second_waits_for_the_first(ranks: list[Rank], server: FaultServer) -> None:
    first, second = ranks
    server.plan[A].append(faults.stall)
    first.pipe.send(PLAN[0])
    server.arrived.get()
    second.pipe.send(PLAN[0])
    second.pipe.send(PLAN[1])  # read after the first range, so it must not arrive before the release
    assert server.count(A) == 1
    server.release.set()
    assert first.pipe.recv() == second.pipe.recv() == cut(PLAN[0])
    assert second.pipe.recv() == cut(PLAN[1])
    assert [header for _, header in server.requests] == ["bytes=0-4999", "bytes=5000-9999"]


@pytest.mark.parametrize("other_waits", [True, False])
def test_a_kill_in_the_middle_of_a_download_leaves_a_cache_that_works(
    ranks: list[Rank], server: FaultServer, tmp_path: Path, other_waits: bool
) -> None:
    first, second = ranks
    server.plan[A].append(faults.stall)
    first.pipe.send(PLAN[0])
    server.arrived.get()  # the request is being answered, so the lock is held
    if other_waits:
        second.pipe.send(PLAN[0])
    first.process.kill()
    first.process.join()
    assert [path.suffix for path in files(tmp_path)] == [".part"] or other_waits
    if not other_waits:
        second.pipe.send(PLAN[0])
    assert second.pipe.recv() == cut(PLAN[0])
    assert server.count(A) == 2
    second.finish()
    assert [path.suffix for path in files(tmp_path)] == [""]


def test_all_ranks_name_the_same_fault_with_the_same_words(ranks: list[Rank], server: FaultServer) -> None:
    for behaviour, words in (
        (faults.flip, "DamagedDataError a.tar: byte 5000: wrong hash"),
        (faults.status(404), f"MissingDataError {server.url}{A}: not found (HTTP 404). "),
        (faults.status(503), f"FetchError {server.url}{A}: could not be fetched: HTTP 503 Service Unavailable. "),
        (faults.reset, f"FetchError {server.url}{A}: could not be fetched: the connection was broken. "),
    ):
        server.always[A] = behaviour
        answers = set()
        for rank in ranks:
            rank.pipe.send(PLAN[1])
            answers.add(rank.pipe.recv())
        assert len(answers) == 1
        assert answers.pop().startswith(words)


def test_the_cap_holds_over_processes(server: FaultServer, tmp_path: Path) -> None:
    cap = 3 * 5008
    pair = [Rank(f"{server.url}/set", tmp_path / "cache", cap) for _ in range(2)]
    for rank, plan in zip(pair, (PLAN, PLAN[::-1]), strict=True):
        assert rank.pipe.recv() == "ready"
        rank.pipe.send(plan)
        assert rank.pipe.recv() == "planned"
    for one, other in zip(PLAN, PLAN[::-1], strict=True):
        for rank, wanted in zip(pair, (one, other), strict=True):
            rank.pipe.send(wanted)
        for rank, wanted in zip(pair, (one, other), strict=True):
            assert rank.pipe.recv() == cut(wanted)
        assert used_at_one_moment(tmp_path / "cache") <= cap
    for rank in pair:
        rank.finish()
