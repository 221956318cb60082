"""Byte streams of input files, decompressed strictly: a file that is cut short is an error, never a short read.

Python's zstandard stream reader takes a truncated frame for the end of the file, hence the own loop.
"""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO

from data_pipeline.errors import DamagedDataError
from data_pipeline.prepare.corpus import InputFile, check_unchanged
from data_pipeline.prepare.remote import open_url
from data_pipeline.prepare.workspace import DISK_FULL

CHUNK = 1 << 20
_MAX_ZSTD_WINDOW = 1 << 31

Advance = Callable[[int], None]
"""Called with the bytes just read from the file as it lies there."""


def open_input(file: InputFile) -> AbstractContextManager[BinaryIO]:
    """The file's bytes as they lie there. Raises ValueError when it has changed since it was listed, OSError
    when it cannot be read."""
    check_unchanged(file)
    if file.remote:
        return open_url(file.location, file.seekable)
    return open(file.location, "rb", buffering=0)


def damaged_input(file: InputFile, where: str, problem: str, byte: int | None = None) -> DamagedDataError:
    """The error for an input that cannot be read to its end."""
    return DamagedDataError(
        f"{file.location}: {where}: {problem}. What to do: fetch this file again (or remove it from the input, "
        "with --force), then run the same command; finished work is kept.",
        shard=file.location,
        byte=byte,
    )


def chunks(file: InputFile, stream: BinaryIO, advance: Advance) -> Iterator[bytes]:
    """The decompressed bytes of ``file`` from the position of ``stream`` on, in pieces of about ``CHUNK``.

    Raises DamagedDataError naming the file and the byte in it where decompression failed or the file ended
    too early.
    """
    if file.compression == "gz":
        return _gunzip(file, stream, advance)
    if file.compression == "zst":
        return _unzstd(file, stream, advance)
    return _raw(stream, advance)


def lines(pieces: Iterator[bytes], start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) for each line of a stream whose first byte has offset ``start``."""
    offset = start
    waiting: list[bytes] = []  # a line longer than many pieces is joined once
    for piece in pieces:
        if b"\n" not in piece:
            waiting.append(piece)
            continue
        first, *rest = piece.split(b"\n")
        complete = [b"".join([*waiting, first]), *rest[:-1]]
        waiting = [rest[-1]] if rest[-1] else []
        for line in complete:
            yield offset, line
            offset += len(line) + 1
    if waiting:
        yield offset, b"".join(waiting)


def _raw(stream: BinaryIO, advance: Advance) -> Iterator[bytes]:
    while piece := stream.read(CHUNK):
        advance(len(piece))
        yield piece


class _Counted:
    """A stream that counts what is read through it."""

    def __init__(self, stream: BinaryIO, advance: Advance) -> None:
        self._stream, self._advance = stream, advance
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self.position += len(piece)
        self._advance(len(piece))
        return piece


def _gunzip(file: InputFile, stream: BinaryIO, advance: Advance) -> Iterator[bytes]:
    source = _Counted(stream, advance)
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as unpacked:  # type: ignore[call-overload]
            empty = True
            while piece := unpacked.read(CHUNK):
                empty = False
                yield piece
    except EOFError:
        raise damaged_input(
            file, f"byte {source.position}", "the gzip stream ends too early; the file is cut short", source.position
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged_input(
            file, f"at or before byte {source.position}", f"not valid gzip ({error})", source.position
        ) from None
    if empty and source.position == 0:
        raise damaged_input(file, "byte 0", "the file is empty, which is no gzip stream", 0)


def _unzstd(file: InputFile, stream: BinaryIO, advance: Advance) -> Iterator[bytes]:
    import zstandard

    source = _Counted(stream, advance)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    frame = None
    packed = source.read(CHUNK // 4)
    if not packed:
        raise damaged_input(file, "byte 0", "the file is empty, which is no zstd stream", 0)
    while packed:
        frame = frame or decompressor.decompressobj()
        try:
            piece = frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise damaged_input(
                file, f"at or before byte {source.position}", f"not valid zstd ({error})", source.position
            ) from None
        packed = b""
        if frame.eof:
            packed, frame = frame.unused_data, None
        if piece:
            yield piece
        packed = packed or source.read(CHUNK // 4)
    if frame is not None:
        raise damaged_input(
            file, f"byte {source.position}", "the zstd stream ends too early; the file is cut short", source.position
        )


@contextlib.contextmanager
def network_errors(files: Sequence[InputFile]) -> Iterator[None]:
    """Errors of remote file systems, which are of many kinds, as OSError that names the first remote one of
    ``files``."""
    try:
        yield
    except Exception as error:
        urls = [file.location for file in files if file.remote]
        if not urls or isinstance(error, (ValueError, MemoryError)) or getattr(error, "errno", None) in DISK_FULL:
            raise
        others = f" (or one of {len(urls) - 1} more)" if len(urls) > 1 else ""
        raise OSError(
            f"{urls[0]}{others} cannot be read: {type(error).__name__}: {error}. What to do: check the connection, "
            "then run the same command again; finished work is kept."
        ) from error
