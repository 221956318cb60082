"""A TCP proxy in front of a server: answers or requests are held back at will, as by a slow server or network."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TcpProxy:
    """Forwards connections to ``target`` (a port of this host) while it listens.

    ``hold_request`` and ``hold_answer`` look at the bytes of a request; what they hold waits for :meth:`release`, in
    the order of a connection. ``delay_s`` passes before every answer. ``requests`` are the first lines seen.
    """

    def __init__(self, target: int, delay_s: float = 0.0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.hold_request: Callable[[bytes], bool] = lambda request: False
        self.hold_answer: Callable[[bytes], bool] = lambda request: False
        self.requests: list[str] = []
        self.held = threading.Event()
        self._released = threading.Event()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._sockets: list[socket.socket] = []

    def listen(self) -> TcpProxy:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def release(self) -> None:
        self._released.set()

    def close(self) -> None:
        self._closing.set()
        self._released.set()
        for each in [self._listener, *self._sockets]:
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [client, server]
                last = [b""]
                threading.Thread(target=self._forward, args=(client, server, last, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, last, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, last: list[bytes], is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_request:
                    if data[:5] in (b"GET /", b"POST ", b"PUT /", b"DELET"):
                        last[0] = data
                        self.requests.append(data.split(b"\r\n")[0].decode())
                    hold = self.hold_request(data)
                else:
                    hold = self.hold_answer(last[0])
                    if self.delay_s:
                        self._closing.wait(self.delay_s)
                if hold:
                    self.held.set()
                    self._released.wait()
                sink.sendall(data)
        # A request stands although its sender has gone: the server is not told, and carries it out.
        if not is_request:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
