"""A misbehaving server, and storages whose waits take no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from fault_server import FaultServer
from fetch_support import DATA, FakeTime

from data_pipeline.fetch.http_storage import HttpStorage
from data_pipeline.fetch.retry import Retry
from data_pipeline.fetch.settings import FetchSettings


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    server = FaultServer({"/set/a.tar": DATA, "/set/b c+é.tar": DATA[::-1], "/set/empty": b""})
    yield server
    server.close()


@pytest.fixture
def fake_time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def open_http(server: FaultServer, fake_time: FakeTime) -> Iterator[Callable[..., HttpStorage]]:
    """Opens ``server``'s folder ``set``; waits between attempts only move the fake clock."""
    opened = []

    def open_it(url: str | None = None, **settings: object) -> HttpStorage:
        retry = partial(Retry, clock=fake_time.clock, sleep=fake_time.sleep, jitter=lambda: 1.0)
        storage = HttpStorage(url or f"{server.url}/set", FetchSettings(**settings), retry)  # type: ignore[arg-type]
        opened.append(storage)
        return storage

    yield open_it
    server.release.set()
    for storage in opened:
        storage.close()
