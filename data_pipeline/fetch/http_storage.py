"""Files below an http(s) URL, by range requests over kept connections (urllib3)."""

from __future__ import annotations

import contextlib
import email.utils
import re
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import urllib3
from urllib3 import exceptions as failures
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from data_pipeline.errors import FetchError
from data_pipeline.fetch.remote import Answer, RemoteStorage, refused, status_error
from data_pipeline.fetch.retry import Retry, TransientError
from data_pipeline.fetch.settings import FetchSettings

_REDIRECTS = 5
_CHUNK = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)$")


class HttpStorage(RemoteStorage):
    """Files below ``url``; its query (a signature, say) is sent with every file and never shown.

    Raises ValueError when the URL has no host.
    """

    def __init__(self, url: str, settings: FetchSettings, retry: Callable[..., Retry] = Retry) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"{url}: names no host. What to do: write https://HOST/FOLDER.")
        host = parts.netloc.rpartition("@")[2]
        self._query = parts.query
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "pretrain"}
        if parts.username:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers |= urllib3.make_headers(basic_auth=secret)
        self._has_ranges = True
        super().__init__(urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")), settings, retry)
        self._connect()

    @property
    def has_ranges(self) -> bool:
        """False once the server answered a range request with the whole file."""
        return self._has_ranges

    def file_url(self, name: str) -> str:
        """See :meth:`RemoteStorage.file_url`."""
        return f"{self.url}/{quote(name)}"

    def after_fork(self) -> None:
        """A child must not write on its parent's connections."""
        super().after_fork()
        self._connect()

    def close(self) -> None:
        """End requests and give up the connections."""
        super().close()
        self._manager.clear()

    def abort(self, cancelled: threading.Event | None) -> None:
        """Shut the sockets of requests in flight, so that their threads wake."""
        self._connections.abort(cancelled)

    def request(self, name: str, start: int, stop: int, cancelled: threading.Event | None) -> Answer:
        """See :meth:`RemoteStorage.request`."""
        shown = self.file_url(name)
        target = f"{shown}?{self._query}" if self._query else shown
        body = _Body(time.monotonic() + self.settings.deadline_s)
        with self._failures(shown), self._connections.tagged(cancelled):
            response = self._manager.request(
                "GET",
                target,
                headers={**self._headers, "Range": f"bytes={start}-{stop - 1}"},
                preload_content=False,
                decode_content=False,
            )
            complete = False
            try:
                answer, complete = self._answer(response, body, shown, name, start, stop)
            finally:
                if complete:
                    response.release_conn()
                else:  # an unread rest would be taken for the next answer
                    response.close()
        return answer

    def _answer(
        self, response: urllib3.BaseHTTPResponse, body: _Body, shown: str, name: str, start: int, stop: int
    ) -> tuple[Answer, bool]:
        """The answer, and whether nothing is left on the connection."""
        status, encoding = response.status, response.headers.get("Content-Encoding", "identity")
        if status in (200, 206) and encoding != "identity":
            raise refused(shown, f"the server sent {encoding} although asked for plain bytes")
        if status == 206:
            return _partial(response, body, start, stop), True
        if status == 200:
            self._has_ranges = False
            self.counters.add("ignored_ranges")
            return _cut_from_whole(response, body, start, stop)
        if status == 416:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if match and match[3] != "*":
                return Answer([], int(match[3])), False
            raise refused(shown, "the file has no such bytes (HTTP 416)")
        wait_s = _retry_after(response.headers.get("Retry-After"))
        raise status_error(shown, name, status, response.reason or "", wait_s)

    @contextlib.contextmanager
    def _failures(self, shown: str) -> Iterator[None]:
        try:
            yield
        except failures.HTTPError as error:
            cause, heals = self._cause(error)
            raise (TransientError(cause) if heals else refused(shown, cause)) from error
        except OSError as error:
            if isinstance(error, FetchError):
                raise
            raise TransientError("the connection was broken") from error

    def _cause(self, error: BaseException) -> tuple[str, bool]:
        """Words for a failure that are equal on every rank (no addresses, ports or times), and whether it may heal."""
        if isinstance(error, failures.MaxRetryError):
            if isinstance(error.reason, failures.ResponseError) or error.reason is None:
                return f"more than {_REDIRECTS} redirects", False
            return self._cause(error.reason)
        if isinstance(error, failures.SSLError):
            inner = error.args[0] if error.args else None
            if isinstance(inner, ssl.SSLCertVerificationError):
                return f"the server's certificate was refused ({inner.verify_message})", False
            return "the TLS connection was broken", True
        if isinstance(error, failures.ProtocolError) and any(isinstance(a, IncompleteRead) for a in error.args):
            return "the body ended early", True
        for kind, cause in (
            (failures.NameResolutionError, "its host name could not be resolved"),
            (failures.NewConnectionError, "the host cannot be reached or refused the connection"),
            (failures.ConnectTimeoutError, f"no connection within {self.settings.connect_timeout_s:g} s"),
            (failures.ReadTimeoutError, f"no data within {self.settings.read_timeout_s:g} s"),
            (failures.ProtocolError, "the connection was broken"),
            (failures.ProxyError, "the proxy cannot be reached"),
        ):
            if isinstance(error, kind):
                return cause, True
        return f"{type(error).__name__}", False

    def _connect(self) -> None:
        settings = self.settings
        self._connections = _Connections()
        options: dict[str, Any] = {
            "maxsize": self._limit,
            "timeout": urllib3.Timeout(connect=settings.connect_timeout_s, read=settings.read_timeout_s),
            # The retry policy is elsewhere; urllib3 only follows redirects.
            "retries": urllib3.Retry(total=None, connect=0, read=0, redirect=_REDIRECTS, status=0, other=0),
        }
        if settings.ca_bundle:
            context = ssl.create_default_context()
            context.load_verify_locations(settings.ca_bundle)
            options["ssl_context"] = context
        parts = urlsplit(self.url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.netloc):
            self._manager: urllib3.PoolManager = urllib3.ProxyManager(proxy, **options)
        else:
            self._manager = urllib3.PoolManager(**options)
        self._manager.pool_classes_by_scheme = self._connections.pool_classes()


class _Connections:
    """The open connections and for whom each works, so that a blocked one can be woken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._thread = threading.local()

    @contextlib.contextmanager
    def tagged(self, cancelled: threading.Event | None) -> Iterator[None]:
        """Connections used by this thread inside the block work for ``cancelled``."""
        self._thread.cancelled = cancelled
        try:
            yield
        finally:
            self._thread.cancelled = None

    def abort(self, cancelled: threading.Event | None) -> None:
        """Shut the sockets that work for ``cancelled``; None shuts all."""
        with self._lock:
            connections = [c for c in self._open if cancelled is None or c.cancelled is cancelled]
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                # Below TLS: the thread that reads must find the end of the stream, not a changed TLS object.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def pool_classes(self) -> dict[str, type]:
        """urllib3 pools whose connections report here."""
        owner = self

        class Plain(HTTPConnection):
            def request(self, *args: Any, **keywords: Any) -> None:
                owner.note(self)
                super().request(*args, **keywords)

        class Secure(HTTPSConnection):
            def request(self, *args: Any, **keywords: Any) -> None:
                owner.note(self)
                super().request(*args, **keywords)

        plain = type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": Plain})
        secure = type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": Secure})
        return {"http": plain, "https": secure}

    def note(self, connection: Any) -> None:
        """``connection`` now works for the calling thread's request."""
        with self._lock:
            connection.cancelled = getattr(self._thread, "cancelled", None)
            self._open.add(connection)


def _partial(response: urllib3.BaseHTTPResponse, body: _Body, start: int, stop: int) -> Answer:
    header = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.match(header)
    if match is None or match[1] is None:
        raise TransientError(f"HTTP 206 with Content-Range {header!r}")
    total = None if match[3] == "*" else int(match[3])
    first, end = int(match[1]), int(match[2]) + 1
    # Fewer bytes are right only where the file ends.
    if first != start or end > stop or (end < stop and total is not None and end != total):
        raise TransientError(f"Content-Range {header!r} instead of bytes {start}-{stop - 1}")
    length = response.headers.get("Content-Length")
    if length is not None and length != str(end - first):
        raise TransientError(f"{length} bytes of body for Content-Range {header!r}")
    answer = Answer(body.take(response, end - first), total)
    if answer.length < end - first:
        raise TransientError("the body ended early")
    if body.take(response, 1):
        raise TransientError("the body is longer than its Content-Range")
    return answer


def _cut_from_whole(response: urllib3.BaseHTTPResponse, body: _Body, start: int, stop: int) -> tuple[Answer, bool]:
    """Bytes ``[start, stop)`` of a body that is the whole file."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    position = 0
    while position < start:
        skipped = sum(map(len, body.take(response, min(start - position, _CHUNK))))
        if not skipped:
            return Answer([], position if total is None else total), False
        position += skipped
    answer = Answer(body.take(response, stop - start), total)
    if total is None and answer.length < stop - start:
        total = start + answer.length
    return Answer(answer.pieces, total), total is not None and total <= stop


class _Body:
    """Reads a body; ``latest``: the monotonic time by which all of it must be there."""

    def __init__(self, latest: float) -> None:
        self._latest = latest

    def take(self, response: urllib3.BaseHTTPResponse, length: int) -> list[bytes]:
        """``length`` bytes, fewer at the end. A silent server meets the read timeout, a slow one ``latest``."""
        pieces: list[bytes] = []
        left = length
        while left:
            piece = response.read1(min(left, _CHUNK))
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
            if left and time.monotonic() > self._latest:
                raise TransientError("the body came too slowly")
        return pieces


def _retry_after(value: str | None) -> float:
    """Seconds to wait: the header is a number or a date; 0 when absent or unreadable."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
