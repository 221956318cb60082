"""One node's task of the node check: its devices, its link to the next node of the ring, its part of the sum.

``python -m launchers.slurm.node_task`` with its part in ``PRETRAIN_NODE_CHECK`` prints one JSON line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

VARIABLE = "PRETRAIN_NODE_CHECK"
BLOCK_BYTES = 4 << 20
LINK_TIMEOUT_S = 20.0
DEVICE_TIMEOUT_S = 120.0
PATIENCE_S = 60.0
"""How long the nodes that have come wait for the others before they try their links without them."""


def main() -> int:
    part = json.loads(os.environ[VARIABLE])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report: dict[str, Any] = {"node": node, "host": socket.gethostname()}
    try:
        _Task(part, node, report).run()
    except (OSError, ValueError) as error:
        report["own_fault"] = str(error)
    print(json.dumps(report), flush=True)
    return 0


class _Task:
    """Device check beside the link, then the sum over the ring."""

    def __init__(self, part: Mapping[str, Any], node: str, report: dict[str, Any]) -> None:
        self.addresses = part["nodes"]
        self.interface = part["interface"]
        self.registry: tuple[str, int] = tuple(part["registry"])
        self.devices = int(part["devices"])
        self.node = node
        self.report = report
        self.names: list[str] = []
        self.index = 0
        self.next = node

    def run(self) -> None:
        devices = threading.Thread(target=self._check_devices)
        devices.start()
        try:
            self._check_link()
        finally:
            devices.join()

    def _check_devices(self) -> None:
        # `auto` (negative) trains on the CPU where there is no device; a driver means that there should be.
        if self.devices == 0 or (self.devices < 0 and not _has_driver()):
            return
        command = [sys.executable, "-m", "pretrain.parallel.device_check", str(abs(self.devices))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=DEVICE_TIMEOUT_S, check=False)
            if result.returncode:
                lines = (result.stdout + result.stderr).strip().splitlines()
                self.report["device_fault"] = lines[-1] if lines else f"the check ended with {result.returncode}"
        except subprocess.TimeoutExpired:
            self.report["device_fault"] = f"no answer within {DEVICE_TIMEOUT_S:g} s"

    def _check_link(self) -> None:
        """A ring: everyone listens, connects to the next, sends a block; a sum goes round twice over the same links."""
        from launchers.slurm.start import interface_address

        own = interface_address(self.interface) if self.interface else self.addresses[self.node]
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        with socket.create_server((own, 0), family=family) as server, contextlib.ExitStack() as stack:
            ring = self._register(own, server.getsockname()[1])
            self.names = [name for name, _, _ in ring]
            self.index = self.names.index(self.node)
            self.next, address, port = ring[(self.index + 1) % len(ring)]
            if len(ring) == 1:
                return
            self.report["next"] = self.next
            incoming: list[socket.socket] = []
            receiver = threading.Thread(target=self._receive, args=(server, incoming), daemon=True)
            receiver.start()
            link = None
            try:
                link = stack.enter_context(socket.create_connection((address, port), timeout=LINK_TIMEOUT_S))
                link.settimeout(LINK_TIMEOUT_S)
                began = time.monotonic()
                _send(link, _block(self.node))
                if link.recv(1) != b"y":
                    raise OSError(f"{self.next} received something else than was sent")
                self.report["mb_per_s"] = round(BLOCK_BYTES / 1e6 / max(time.monotonic() - began, 1e-6), 1)
            except OSError as error:
                self.report["link_fault"] = f"{address}: {str(error) or type(error).__name__}"
                link = None
            receiver.join(2 * LINK_TIMEOUT_S)
            for before in incoming:
                stack.enter_context(before)
                if link is not None:
                    self._sum(link, before)

    def _register(self, own: str, port: int) -> list[tuple[str, str, int]]:
        """Tells the supervisor where this node listens; (name, address, port) of all nodes that did, in their order."""
        try:
            with socket.create_connection(self.registry, timeout=LINK_TIMEOUT_S) as link:
                link.settimeout(PATIENCE_S + LINK_TIMEOUT_S)
                link.sendall(json.dumps({"node": self.node, "address": own, "port": port}).encode() + b"\n")
                answer = json.loads(link.makefile("r", encoding="utf-8").readline())
        except OSError as error:
            raise OSError(
                f"the batch host at {self.registry[0]}:{self.registry[1]} cannot be reached ({error})"
            ) from error
        if answer["late_s"]:
            self.report["late_s"] = answer["late_s"]
        return [(str(name), str(address), int(port)) for name, address, port in answer["ring"]]

    def _receive(self, server: socket.socket, incoming: list[socket.socket]) -> None:
        server.settimeout(LINK_TIMEOUT_S)
        before = self.names[self.index - 1]
        with contextlib.suppress(OSError):  # the node before says it
            connection = server.accept()[0]
            connection.settimeout(LINK_TIMEOUT_S)
            is_whole = _receive_block(connection) == _block(before)
            connection.sendall(b"y" if is_whole else b"n")
            incoming.append(connection)

    def _sum(self, link: socket.socket, before: socket.socket) -> None:
        """The all-reduce: partial sums of (index + 1) go once round, the total a second time."""
        count = len(self.names)
        expected = count * (count + 1) // 2
        try:
            if self.index == 0:
                _send(link, struct.pack("<q", 1))
                total = struct.unpack("<q", _receive_block(before))[0]
                _send(link, struct.pack("<q", total))
                _receive_block(before)
            else:
                partial = struct.unpack("<q", _receive_block(before))[0]
                _send(link, struct.pack("<q", partial + self.index + 1))
                total = struct.unpack("<q", _receive_block(before))[0]
                _send(link, struct.pack("<q", total))
            if total != expected:
                self.report["own_fault"] = f"the sum over all nodes is {total}, expected {expected}"
        except OSError as error:
            self.report.setdefault("sum_fault", str(error) or type(error).__name__)


def _block(node: str) -> bytes:
    """Known content that differs between nodes."""
    seed = hashlib.sha256(node.encode()).digest()
    return seed * (BLOCK_BYTES // len(seed))


def _send(link: socket.socket, data: bytes) -> None:
    link.sendall(struct.pack("<q", len(data)) + data)


def _receive_block(link: socket.socket) -> bytes:
    size = struct.unpack("<q", _exactly(link, 8))[0]
    if not 0 <= size <= BLOCK_BYTES:
        raise OSError(f"a block of {size} bytes was announced")
    return _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(min(1 << 20, size - len(parts)))
        if not part:
            raise OSError("the connection was closed")
        parts += part
    return bytes(parts)


def _has_driver() -> bool:
    return (
        os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
    )


if __name__ == "__main__":
    sys.exit(main())
