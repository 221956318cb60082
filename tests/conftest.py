"""Fixtures shared by all tests. CPU tests run with one thread a process: more were seen many times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from collections.abc import Callable, Iterator

import pytest
from support.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def worker_pools() -> Iterator[Callable[[int], WorkerPool]]:
    """Pools of gloo processes by size, started on first use and shared by the whole session."""
    pools: dict[int, WorkerPool] = {}

    def get(size: int) -> WorkerPool:
        if size not in pools or not pools[size].alive:
            pools[size] = WorkerPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()
