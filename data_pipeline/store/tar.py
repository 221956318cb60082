"""Plain ustar archives: a byte-reproducible header writer and a strict walk.

Why not ``webdataset.TarWriter``: in 1.0.2 it ignores its ``format`` argument (Python's PAX default applies),
reports no member offsets, which the sidecar needs, and importing it imports torch. A ustar header from the
standard library's ``tarfile`` is four lines, and every WebDataset tool reads the result.

Why not ``tarfile`` for reading: it takes a bad header after the first member for the end of the archive, so a
damaged shard silently loses its tail. The walk here accepts nothing it cannot account for.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.errors import DamagedDataError

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
_REMEDY = "restore this shard from a copy, or prepare the dataset again with --force"


@dataclass(frozen=True)
class TarMember:
    """One regular file in an archive: ``offset`` and ``length`` in bytes of its payload."""

    name: str
    offset: int
    length: int


def member_header(name: str, length: int) -> bytes:
    """The 512-byte ustar header of a regular file: mode 0444, owner 0, mtime 0, so that equal data are equal
    bytes.

    Raises ValueError when ``name`` (100 bytes) or ``length`` (8 GiB) does not fit a ustar header.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = length, 0o444, 0
    header = info.tobuf(format=tarfile.USTAR_FORMAT)
    assert len(header) == BLOCK
    return header


def padding_after(length: int) -> int:
    """Zero bytes that follow a payload of ``length`` bytes up to the next 512-byte boundary."""
    return -length % BLOCK


def damaged(shard: str | os.PathLike[str], byte: int, problem: str) -> DamagedDataError:
    """The error for ``problem`` at ``byte`` of ``shard``."""
    return DamagedDataError(f"{os.fspath(shard)}: byte {byte}: {problem}. What to do: {_REMEDY}.")


def parse_header(shard: str | os.PathLike[str], header: bytes, at: int) -> TarMember:
    """Parse one member header found at byte ``at`` of ``shard``.

    Raises DamagedDataError for a wrong checksum, a foreign magic, anything but a regular file (links,
    devices, PAX and GNU records included) and unsafe names (absolute, or with ``..``).
    """
    if len(header) < BLOCK:
        raise damaged(shard, at, f"member header cut short: {len(header)} of {BLOCK} bytes")
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise damaged(shard, at, f"not a valid member header ({error})") from None
    if header[257:262] != b"ustar":
        raise damaged(shard, at, "member header is not ustar")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise damaged(shard, at, f"member {info.name!r} is not a regular file (type {info.type!r})")
    if info.name.startswith("/") or ".." in info.name.split("/") or info.size < 0:
        raise damaged(shard, at, f"member name {info.name!r} is unsafe")
    return TarMember(info.name, at + BLOCK, info.size)


def walk(stream: BinaryIO, shard: str | os.PathLike[str]) -> Iterator[TarMember]:
    """Yield the members of an archive in order, reading only the headers and the padding.

    Raises DamagedDataError for a bad header, a duplicate name, a payload that passes the end of the file,
    padding that is not zero, a missing end marker, or anything but zeros after it.
    """
    size = stream.seek(0, os.SEEK_END)
    position = 0
    seen: set[str] = set()
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            break
        member = parse_header(shard, header, position)
        if member.name in seen:
            raise damaged(shard, position, f"member {member.name!r} appears twice")
        seen.add(member.name)
        end = member.offset + member.length
        position = end + padding_after(member.length)
        if position > size:
            raise damaged(shard, size, f"file ends inside member {member.name!r} (it needs {position} bytes)")
        stream.seek(end)
        if any(stream.read(position - end)):
            raise damaged(shard, end, f"padding after member {member.name!r} is not zero")
        yield member
    tail = stream.read()
    if len(tail) < BLOCK:
        raise damaged(shard, position, "end-of-archive marker cut short")
    if any(tail):
        raise damaged(shard, position, "data after the end-of-archive marker, or a zeroed member header")
