"""One function over many shards, in processes where the work is worth their start."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, parent_process
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Below this, starting processes takes longer than the work.
_WORTH_PROCESSES_BYTES = 1 << 26


def map_shards(
    function: Callable[[Item], Result], items: Sequence[Item], total_bytes: int, workers: int | None
) -> Iterator[Result]:
    """``function`` of each of ``items``, in their order. ``workers`` None: the usable cores.

    ``function`` must be importable by name. Raises what it raises, and ChildProcessError when a process dies.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if workers <= 1 or total_bytes < _WORTH_PROCESSES_BYTES:
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, get_context("spawn"), _leave_with_parent)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that reads shards was killed, most likely for want of memory. What to do: run it again with "
            "fewer --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # A killed parent would otherwise leave its idle workers behind.
    threading.Thread(target=wait, daemon=True).start()
