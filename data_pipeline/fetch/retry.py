"""The one retry policy: exponential back-off with full jitter, within a number of attempts and a deadline.

A storage raises TransientError for what may heal; everything else leaves at once. The message of the final error
holds no times and no counts, so that all ranks report the same fault with the same words.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipeline.errors import FetchError
from data_pipeline.fetch.counters import Counters
from data_pipeline.fetch.settings import FetchSettings

T = TypeVar("T")


class TransientError(Exception):
    """An attempt failed in a way that may heal. ``retry_after_s``: the wait that the server asked for."""

    def __init__(self, cause: str, retry_after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class Retry:
    """Calls an action until it succeeds, fails for good, or attempts or time are spent.

    ``clock``, ``sleep`` and ``jitter`` (a draw from [0, 1)) may be replaced in tests. Thread-safe.
    """

    def __init__(
        self,
        settings: FetchSettings,
        counters: Counters,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings, self._counters = settings, counters
        self._clock, self._jitter = clock, jitter
        self._sleep = sleep
        self._closed = False
        self._woken = threading.Condition()

    def call(self, action: Callable[[], T], url: str, cancelled: threading.Event | None = None) -> T:
        """What ``action()`` returns.

        Raises FetchError when it kept raising TransientError, or once :meth:`close` was called or ``cancelled``
        is set; any other error of the action at once.
        """
        start = self._clock()
        attempt = 0
        while True:
            attempt += 1
            if self._over(cancelled):
                raise self.closed_error(url)
            try:
                return action()
            except TransientError as error:
                wait_s = max(error.retry_after_s, self._backoff(attempt))
                late = self._clock() - start + wait_s >= self._settings.deadline_s
                if late or attempt >= self._settings.attempts:
                    raise self._error(url, str(error), attempt, start) from error
            self._counters.add("retries")
            self._wait(wait_s, cancelled)

    def close(self) -> None:
        """End all waits; calls in progress raise FetchError at their next attempt."""
        self._closed = True
        self.wake()

    def wake(self) -> None:
        """End the waits of calls whose ``cancelled`` was set."""
        with self._woken:
            self._woken.notify_all()

    def closed_error(self, url: str) -> FetchError:
        """The error of a read that was ended from this side."""
        return FetchError(f"{url}: reading was ended because the storage or the cache was closed.", url=url)

    def after_fork(self) -> None:
        """A child starts with a lock of its own."""
        self._woken = threading.Condition()

    def _over(self, cancelled: threading.Event | None) -> bool:
        return self._closed or (cancelled is not None and cancelled.is_set())

    def _backoff(self, attempt: int) -> float:
        longest = min(self._settings.longest_wait_s, self._settings.first_wait_s * 2 ** (attempt - 1))
        return self._jitter() * longest

    def _wait(self, seconds: float, cancelled: threading.Event | None) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
        else:
            with self._woken:
                self._woken.wait_for(lambda: self._over(cancelled), timeout=seconds)

    def _error(self, url: str, cause: str, attempts: int, start: float) -> FetchError:
        seconds = self._clock() - start
        error = FetchError(
            f"{url}: could not be fetched: {cause}. What to do: check that the server is up and can be reached from "
            "every node, then start the run again; it goes on where it stopped.",
            url=url,
            attempts=attempts,
            seconds=seconds,
        )
        error.add_note(f"{attempts} attempts in {seconds:.1f} s")
        return error
