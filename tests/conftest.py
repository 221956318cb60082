"""Fixtures shared by all tests. CPU tests run with one thread a process: more were seen many times slower."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.small_text import prepare_small_text
from support.worker_pool import WorkerPool

# A shell that starts a job in the background makes it ignore SIGINT (and `nohup` SIGHUP), and every process of a test
# would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that with several workers none of them is the last one, alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def worker_pools() -> Iterator[Callable[..., WorkerPool]]:
    """Pools of gloo processes by size and kind, started on first use and shared by the whole session."""
    pools: dict[tuple[int, str], WorkerPool] = {}

    def get(size: int, kind: str = "") -> WorkerPool:
        if (size, kind) not in pools or not pools[size, kind].alive:
            pools[size, kind] = WorkerPool(size)
        return pools[size, kind]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set of runs (:mod:`support.small_text`), prepared once for the whole session."""
    return prepare_small_text(tmp_path_factory.mktemp("data") / "json")
