"""Durable small files: written whole or not at all, and still there after a crash. Torch-free."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


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
