"""The few files of a run directory that tracking reads, and the durable way to write a small file.

Tracking works on a run directory's files alone, so that a run can be sent to MLflow from a live rank or
long after its end. Torch-free and light.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path
from typing import Any

_REVISION = re.compile(r"^(\d{4,})\.yaml$")


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
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def latest_config_file(run_path: Path) -> tuple[int, Path]:
    """Number and path of the highest frozen revision; revision 0 is ``config.yaml`` itself."""
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        numbers = [int(m.group(1)) for entry in os.listdir(run_path / "revisions") if (m := _REVISION.match(entry))]
    if not numbers:
        return 0, run_path / "config.yaml"
    return max(numbers), run_path / "revisions" / f"{max(numbers):04d}.yaml"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level with dotted names; lists and empty mappings stay values of their own."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def redact_url(text: str) -> str:
    """Hides the ``user:password@`` part of URLs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
