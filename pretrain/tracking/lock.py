"""One sender at a time for a run directory: a rank's thread, the supervisor and a user may all want to send.

The lock only spares work and keeps ``mlflow.json`` in one hand; sending twice at once would leave the same metrics.
So a file system that cannot lock is no reason to stop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_POLL_S = 0.1


class BusyError(RuntimeError):
    """Another process or thread is sending this run just now."""


@contextlib.contextmanager
def sender_lock(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds the lock file ``path``; its holder's death frees it. Waits ``timeout_s`` seconds at most.

    Raises BusyError when another holds it all that time. Where files cannot be made or locked, holds nothing.
    """
    descriptor = -1
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if descriptor >= 0:
            _acquire(descriptor, path, time.monotonic() + timeout_s)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _acquire(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _BUSY:
                return
        if time.monotonic() >= deadline:
            raise BusyError(f"{path}: another process is sending this run to MLflow just now; it delivers what is new")
        time.sleep(_POLL_S)
