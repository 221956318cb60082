"""A real http server that answers range requests, and misbehaves as a test tells it."""

from __future__ import annotations

import queue
import re
import socket
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Behaviour = Callable[["Handler", bytes], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None: ...  # resets are meant


class FaultServer:
    """Serves ``files`` (URL path -> bytes). ``plan[path]`` holds behaviours for the next requests of a path; then it
    serves well, unless ``always[path]`` is set. ``requests`` lists (path, Range header or None)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.plan: dict[str, deque[Behaviour]] = defaultdict(deque)
        self.always: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived: queue.Queue[str] = queue.Queue()
        self.release = threading.Event()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def count(self, path: str) -> int:
        """Requests for ``path`` so far."""
        return sum(1 for asked, _ in self.requests if asked == path)

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None: ...

    @property
    def owner(self) -> FaultServer:
        return self.server.owner  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        owner, path = self.owner, unquote(self.path.partition("?")[0])
        owner.requests.append((path, self.headers.get("Range")))
        owner.headers.append({**{k.lower(): v for k, v in self.headers.items()}, "query": self.path.partition("?")[2]})
        owner.arrived.put(path)
        behaviour = owner.plan[path].popleft() if owner.plan[path] else owner.always.get(path, well)
        try:
            behaviour(self, owner.files.get(path, b""))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def bounds(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def partial_head(self, data: bytes, length: int | None = None) -> bytes:
        """Send a sound 206 head (``length``: another Content-Length); gives the body that belongs to it."""
        start, stop = self.bounds(len(data))
        body = data[start:stop]
        self.head(
            206,
            Content_Range=f"bytes {start}-{stop - 1}/{len(data)}",
            Content_Length=len(body) if length is None else length,
        )
        return body


def well(handler: Handler, data: bytes) -> None:
    if unquote(handler.path.partition("?")[0]) not in handler.owner.files:
        handler.head(404, Content_Length=0)
    elif "Range" not in handler.headers:
        handler.head(200, Content_Length=len(data))
        handler.wfile.write(data)
    elif handler.bounds(len(data))[0] >= len(data):
        handler.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
    else:
        handler.wfile.write(handler.partial_head(data))


def status(code: int, **headers: object) -> Behaviour:
    return lambda handler, data: handler.head(code, Content_Length=0, **headers)


def reset(handler: Handler, data: bytes) -> None:
    """Half a body, then a TCP reset."""
    body = handler.partial_head(data)
    handler.wfile.write(body[: len(body) // 2])
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def short(handler: Handler, data: bytes) -> None:
    """Half of the body that Content-Length announces."""
    body = handler.partial_head(data)
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def short_and_says_so(handler: Handler, data: bytes) -> None:
    """Half of the body that Content-Range announces, with a Content-Length that fits the half."""
    start, stop = handler.bounds(len(data))
    body = handler.partial_head(data, length=(stop - start) // 2)
    handler.wfile.write(body[: len(body) // 2])


def stall(handler: Handler, data: bytes) -> None:
    """Half a body, then silence until the test releases the server."""
    body = handler.partial_head(data)
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.owner.release.wait()
    handler.wfile.write(body[len(body) // 2 :])


def drip(handler: Handler, data: bytes) -> None:
    """A byte now and then: never silent, never done."""
    body = handler.partial_head(data)
    for position in range(len(body)):
        handler.wfile.write(body[position : position + 1])
        if handler.owner.release.wait(0.02):
            return


def silent(handler: Handler, data: bytes) -> None:
    """Not even a head until the test releases the server."""
    handler.owner.release.wait()
    well(handler, data)


def ignores_range(handler: Handler, data: bytes) -> None:
    handler.head(200, Content_Length=len(data))
    handler.wfile.write(data)


def ignores_range_without_length(handler: Handler, data: bytes) -> None:
    handler.head(200, Transfer_Encoding="chunked")
    for start in range(0, len(data), 1000):
        piece = data[start : start + 1000]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def wrong_range(handler: Handler, data: bytes) -> None:
    start, stop = handler.bounds(len(data))
    body = data[start:stop]
    handler.head(206, Content_Range=f"bytes {start + 1}-{stop}/{len(data) + 1}", Content_Length=len(body))
    handler.wfile.write(body)


def without_content_range(handler: Handler, data: bytes) -> None:
    start, stop = handler.bounds(len(data))
    handler.head(206, Content_Length=stop - start)
    handler.wfile.write(data[start:stop])


def too_long(handler: Handler, data: bytes) -> None:
    start, stop = handler.bounds(len(data))
    body = data[start:stop] + b"more"
    handler.head(206, Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", Transfer_Encoding="chunked")
    handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")


def flip(handler: Handler, data: bytes) -> None:
    """The right length, one bit wrong."""
    body = bytearray(handler.partial_head(data))
    body[len(body) // 2] ^= 1
    handler.wfile.write(body)


def gzipped(handler: Handler, data: bytes) -> None:
    handler.head(200, Content_Encoding="gzip", Content_Length=3)
    handler.wfile.write(b"abc")


def redirect(target: str) -> Behaviour:
    return lambda handler, data: handler.head(302, Location=target, Content_Length=0)
