"""Threads that block on a queue and die with the process, and what a forked child must renew.

Not ``concurrent.futures.ThreadPoolExecutor``: the interpreter joins its threads at exit, so that one stalled
server would hold up the end of a run that forgot to close.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Forkable(Protocol):
    """Has threads, locks or connections that a forked child cannot use."""

    def after_fork(self) -> None:
        """Replace them; called in the child, where only the forking thread exists."""


_forkable: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_in_children(item: Forkable) -> None:
    """Call ``item.after_fork()`` in every child that this process forks from now on."""
    _forkable.add(item)


def _after_fork() -> None:
    request_slots.cache_clear()
    for item in list(_forkable):
        item.after_fork()


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def request_slots(limit: int) -> threading.BoundedSemaphore:
    """The slots for requests in flight that all storages of this process with the same ``limit`` share."""
    return threading.BoundedSemaphore(limit)


class Workers:
    """At most ``limit`` daemon threads, started when first needed, that run what is submitted in its order."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit, self._name = limit, name
        self._closed = False
        self.after_fork()

    def after_fork(self) -> None:
        """A child starts without threads and without work."""
        self._changed = threading.Condition()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def submit(self, action: Callable[[], T]) -> Future[T]:
        """Run ``action()`` on a thread; after :meth:`close` the future comes cancelled."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                future.cancel()
                return future
            self._work.append((future, action))
            if self._idle < len(self._work) and len(self._threads) < self._limit:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what has not started and wait for what has."""
        with self._changed:
            self._closed = True
            waiting, self._work = self._work, deque()
            threads, self._threads = self._threads, []
            self._changed.notify_all()
        for future, _ in waiting:
            future.cancel()
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: bool(self._work) or self._closed)
                self._idle -= 1
                if not self._work:
                    return
                future, action = self._work.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except BaseException as error:  # it belongs to whoever waits for the future
                future.set_exception(error)
            del future, action  # an idle thread must not keep a result alive
