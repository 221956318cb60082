"""Durable small files: written whole or not at all, and still there after a crash. Torch-free."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

NO_ROOM: dict[int, str] = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EROFS: "have the file system mounted for writing",
}
"""The errno of a file system that takes no more files, and the way out; trying again is no use before it is taken."""


def way_out(error: OSError) -> str:
    """What a user can do about a file that could not be written, as a clause."""
    return NO_ROOM.get(error.errno or 0, "see that it can be read and written from here")


def fsync_directory(folder: Path) -> None:
    """Makes names created or replaced in ``folder`` durable; ignored where directories cannot be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_temporary(path: Path, text: str) -> Path:
    # A name of its own for each call: two writers of one target must never share a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``; a reader, or a crash, sees the old or the new text, nothing between.

    Raises OSError (disk full, no permission); the old file is then untouched.
    """
    temporary = _write_temporary(path, text)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def exclusive_write_text(path: Path, text: str) -> None:
    """Creates ``path`` with ``text``, complete from the first moment. Raises FileExistsError."""
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (some network and FUSE file systems): exclusive, though not complete at once.
        with open(path, "x", encoding="utf-8") as stream:
            try:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
