"""What http and S3 have in common: parts of a long read in flight at once, retries, lengths, counters.

Requests in flight are capped for each node without talking between processes: every process takes
``requests_per_node // processes_per_node`` slots (at least one), and all storages of a process share them. A wait
between attempts holds no slot.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial

from data_pipeline.errors import DamagedDataError, FetchError
from data_pipeline.fetch.counters import fetch_counters
from data_pipeline.fetch.retry import Retry, TransientError
from data_pipeline.fetch.settings import FetchSettings
from data_pipeline.fetch.storage import check_name, missing, too_short
from data_pipeline.fetch.threads import Workers, renew_in_children, request_slots

_MISSING = {
    401: "the server wants other credentials (HTTP 401)",
    403: "access denied (HTTP 403)",
    404: "not found (HTTP 404)",
    410: "gone (HTTP 410)",
}
_HEALING = {408, 425, 429}
_NOT_HEALING = {501, 505}


@dataclass(frozen=True)
class Answer:
    """Bytes from the start asked for, fewer than asked only where the file ends; ``total``: the file's size, None
    when the server does not tell. They stay in the pieces that came: a join costs as much as the transfer."""

    pieces: list[bytes]
    total: int | None

    @property
    def length(self) -> int:
        """Number of bytes."""
        return sum(map(len, self.pieces))


class RemoteStorage(ABC):
    """A storage whose reads are requests. Subclasses make one request; this class does everything else."""

    def __init__(self, url: str, settings: FetchSettings, retry: Callable[..., Retry] = Retry) -> None:
        self.url = url
        self.settings = settings
        self.counters = fetch_counters()
        self._retry = retry(settings, self.counters)
        self._limit = settings.requests_in_flight()
        self._workers = Workers(self._limit, "fetch-part")
        renew_in_children(self)

    @abstractmethod
    def request(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> Answer:
        """One attempt at bytes ``[start, stop)``, ``start < stop``.

        Raises TransientError for what may heal, and for good: MissingDataError, FetchError.
        """

    @abstractmethod
    def file_url(self, name: str) -> str:
        """The URL of a file for messages, without secrets."""

    def abort(self, cancelled: threading.Event | None) -> None:  # noqa: B027 (nothing to do is a fine default)
        """End the requests in flight that were made with ``cancelled`` (None: all), where that is possible."""

    def read(
        self, name: str, start: int = 0, length: int | None = None, *, cancelled: threading.Event | None = None
    ) -> bytes:
        """See :meth:`data_pipeline.fetch.storage.Storage.read`; :meth:`cancel` ends a read made with ``cancelled``."""
        check_name(name)
        if length is None:
            return self._read_to_end(name, start, cancelled)
        if start < 0 or length < 0:
            raise ValueError(f"{name}: bytes {start} to {start + length} are no range")
        return _joined(self._read_range(name, start, start + length, cancelled))

    def size(self, name: str) -> int:
        """See :meth:`data_pipeline.fetch.storage.Storage.size`. One request for one byte: unlike HEAD, signed
        URLs allow it."""
        check_name(name)
        total = self._attempt(name, 0, 1, None).total
        return len(self.read(name)) if total is None else total

    def cancel(self, cancelled: threading.Event) -> None:
        """Set the event and end the reads made with it: they raise FetchError."""
        cancelled.set()
        self._retry.wake()
        self.abort(cancelled)

    def close(self) -> None:
        """End all requests and waits, then the threads."""
        self._retry.close()
        self.abort(None)
        self._workers.close()

    def after_fork(self) -> None:
        """A child starts with threads, locks and connections of its own."""
        self.counters.after_fork()
        self._retry.after_fork()
        self._workers.after_fork()

    def _read_to_end(self, name: str, start: int, cancelled: threading.Event | None) -> bytes:
        # The first part tells the size; most files read whole are small and need no second request.
        pieces: list[bytes] = []
        position, total = start, None
        while total is None:
            answer = self._attempt(name, position, position + self.settings.part_bytes, cancelled)
            pieces += answer.pieces
            position += answer.length
            total = answer.total
            if total is None and answer.length < self.settings.part_bytes:
                total = position
        if start > total:
            raise too_short(self.file_url(name), name, total, start, start)
        if position < total:
            pieces += self._read_range(name, position, total, cancelled)
        return _joined(pieces)

    def _read_range(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> list[bytes]:
        step = self.settings.part_bytes if self.has_ranges else stop - start
        bounds = [(low, min(low + step, stop)) for low in range(start, stop, max(step, 1))]
        if not bounds:
            return []
        rest = [self._workers.submit(partial(self._part, name, *bound, cancelled)) for bound in bounds[1:]]
        try:
            parts = [self._part(name, *bounds[0], cancelled), *(future.result() for future in rest)]
        except CancelledError:
            raise self._retry.closed_error(self.file_url(name)) from None
        except BaseException:
            for future in rest:
                future.cancel()
            raise
        return [piece for part in parts for piece in part]

    @property
    def has_ranges(self) -> bool:
        """Whether the server is known to ignore ranges is False; then reads are not cut into parts."""
        return True

    def _part(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> list[bytes]:
        answer = self._attempt(name, start, stop, cancelled)
        if answer.length < stop - start:
            raise self._ends_early(name, start, stop, answer)
        return answer.pieces

    def _ends_early(self, name: str, start: int, stop: int, answer: Answer) -> DamagedDataError:
        end = start + answer.length if answer.total is None else answer.total
        return too_short(self.file_url(name), name, end, start, stop)

    def _attempt(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> Answer:
        def once() -> Answer:
            with request_slots(self._limit):
                begin = time.monotonic()
                self.counters.add("requests")
                try:
                    answer = self.request(name, start, stop, cancelled)
                finally:
                    self.counters.add("seconds", time.monotonic() - begin)
            self.counters.add("bytes", answer.length)
            return answer

        return self._retry.call(once, self.file_url(name), cancelled)


def _joined(pieces: list[bytes]) -> bytes:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def refused(url: str, cause: str) -> FetchError:
    """The error for an answer that another attempt would not change."""
    return FetchError(
        f"{url}: could not be fetched: {cause}. What to do: check the location and the server; trying again does "
        "not help.",
        url=url,
        attempts=1,
    )


def status_error(url: str, name: str, status: int, reason: str, retry_after_s: float = 0.0) -> Exception:
    """The error for an HTTP status that is no success: TransientError when it may heal, else MissingDataError or
    FetchError."""
    if status in _MISSING:
        return missing(url, name, _MISSING[status])
    words = f"HTTP {status} {reason}".strip()
    if status in _HEALING or (status >= 500 and status not in _NOT_HEALING):
        return TransientError(words, retry_after_s)
    return refused(url, words)
