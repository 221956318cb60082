"""Files below one root, by name and byte range: a local folder, http(s) or s3.

Nothing is ever listed: names come from the manifest. A read gives exactly the bytes asked for, or an error that
reads the same on every rank.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import DamagedDataError, MissingDataError
from data_pipeline.fetch.counters import Counters, fetch_counters
from data_pipeline.fetch.retry import Retry, TransientError
from data_pipeline.fetch.settings import FetchSettings
from data_pipeline.fetch.threads import renew_in_children

# Some kernels copy at most 2 GiB less a page in one call.
_LARGEST_READ = 1 << 30
# What a network file system says for a moment and then no more.
_HEALING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH}


@dataclass(frozen=True, order=True)
class ByteRange:
    """Bytes ``[start, stop)`` of the file ``name`` of a storage.

    Raises ValueError for a range that cannot be or a name that leaves the root.
    """

    name: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"{self.name}: bytes {self.start} to {self.stop} are no range")

    @property
    def length(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


@runtime_checkable
class Storage(Protocol):
    """Files below one root. All methods may be called from any thread."""

    url: str

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start`` on (None: to the end of the file).

        Raises MissingDataError when the file is not there or not readable, DamagedDataError when it is shorter
        than asked, FetchError when retries are spent, ValueError for a name that leaves the root.
        """

    def size(self, name: str) -> int:
        """Bytes of the file; raises as :meth:`read`."""

    def close(self) -> None:
        """End requests in flight and give up connections. Reading afterwards is an error."""


def check_name(name: str) -> str:
    """``name``, when it is a plain relative path below the root.

    Raises ValueError for absolute paths, ``..``, empty parts and control characters.
    """
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{name!r} is no name of a file below the data set's root: names are relative, without empty, '.' or "
            "'..' parts. What to do: do not use this data set; prepare or index it again."
        )
    return name


def too_short(url: str, name: str, size: int, start: int, stop: int) -> DamagedDataError:
    """The error for a file that ends before the bytes asked for."""
    return DamagedDataError(
        f"{url}: the file ends at byte {size}, but bytes {start} to {stop} were asked for. "
        "What to do: restore this file from a copy, or prepare the data set again.",
        shard=name,
        byte=size,
    )


def missing(url: str, name: str, reason: str) -> MissingDataError:
    """The error for a file that is not there or may not be read."""
    return MissingDataError(
        f"{url}: {reason}. What to do: check the location and the right to read it on every node; trying again "
        "does not help.",
        shard=name,
    )


def open_storage(url: str | os.PathLike[str], settings: FetchSettings | None = None) -> Storage:
    """The storage of a path, ``file://``, ``http(s)://`` or ``s3://BUCKET/PREFIX`` location. Opens no connection.

    Raises ValueError for other schemes or a location that cannot be.
    """
    settings = settings or FetchSettings()
    text = os.fspath(url)
    scheme = urlsplit(text).scheme.lower() if "://" in text else ""
    if not scheme:
        return LocalStorage(Path(text), settings)
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: names host {parts.netloc!r}. What to do: write file:///PATH, or just the path.")
        return LocalStorage(Path(unquote(parts.path)), settings)
    if scheme in ("http", "https"):
        from data_pipeline.fetch.http_storage import HttpStorage

        return HttpStorage(text, settings)
    if scheme == "s3":
        from data_pipeline.fetch.s3_storage import S3Storage

        return S3Storage(text, settings)
    raise ValueError(
        f"{text}: scheme {scheme!r} is not supported; a path, file://, http://, https:// and s3:// are. "
        "What to do: use the store's S3 or https end point, mount it, or copy the data set."
    )


class LocalStorage:
    """Files below a local folder. Holds nothing open between calls, so threads and forks are no matter."""

    def __init__(self, folder: Path, settings: FetchSettings | None = None, *, retry: Retry | None = None) -> None:
        self.folder = folder
        self.url = str(folder)
        self.counters: Counters = fetch_counters()
        self._retry = retry or Retry(settings or FetchSettings(), self.counters)
        renew_in_children(self)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Storage.read`."""
        path = self._path(name)
        return self._retry.call(lambda: self._read(path, name, start, length), str(path))

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``start`` on; raises as :meth:`Storage.read`."""
        path = self._path(name)
        self._retry.call(lambda: self._read_into(path, name, start, target), str(path))

    def size(self, name: str) -> int:
        """See :meth:`Storage.size`."""
        path = self._path(name)

        def look() -> int:
            descriptor = self._open(path, name)
            try:
                return os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)

        return self._retry.call(look, str(path))

    def close(self) -> None:
        """Ends waits between attempts."""
        self._retry.close()

    def after_fork(self) -> None:
        """A child has locks of its own."""
        self.counters.after_fork()
        self._retry.after_fork()

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def _read(self, path: Path, name: str, start: int, length: int | None) -> bytes:
        descriptor = self._open(path, name)
        try:
            size = os.fstat(descriptor).st_size
            stop = size if length is None else start + length
            if not start <= stop <= size:
                raise too_short(str(path), name, size, start, stop)
            pieces, position = [], start
            while position < stop:
                piece = _pread(descriptor, min(stop - position, _LARGEST_READ), position, path)
                if not piece:  # it shrank since its size was asked
                    raise too_short(str(path), name, position, start, stop)
                pieces.append(piece)
                position += len(piece)
        finally:
            os.close(descriptor)
        self.counters.add("bytes", stop - start)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_into(self, path: Path, name: str, start: int, target: memoryview) -> None:
        descriptor = self._open(path, name)
        try:
            done = 0
            while done < len(target):
                try:
                    count = os.preadv(descriptor, [target[done : done + _LARGEST_READ]], start + done)
                except OSError as error:
                    raise TransientError(error.strerror or str(error)) from error
                if not count:
                    raise too_short(str(path), name, os.fstat(descriptor).st_size, start, start + len(target))
                done += count
        finally:
            os.close(descriptor)
        self.counters.add("bytes", len(target))

    def _open(self, path: Path, name: str) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _HEALING:
                raise TransientError(error.strerror or str(error)) from error
            raise missing(str(path), name, error.strerror or str(error)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise missing(str(path), name, "not a regular file")
        return descriptor


def _pread(descriptor: int, length: int, position: int, path: Path) -> bytes:
    try:
        return os.pread(descriptor, length, position)
    except OSError as error:
        raise TransientError(error.strerror or str(error)) from error
