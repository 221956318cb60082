"""Fixtures shared by all tests. CPU tests run with one thread a process: more were seen many times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from collections.abc import Callable, Iterator

import pytest
from support.worker_pool import WorkerPool


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
