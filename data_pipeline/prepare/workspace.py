"""A dataset folder appears whole or not at all: work in a hidden sibling folder, then rename it.

For output ``DIR/name`` the work lies in ``DIR/.name.preparing`` under the lock ``DIR/.name.lock``. A killed
run leaves only these; the next run for the same output, which is the one that can take the lock, sweeps them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.store.manifest import MANIFEST_NAME


class Workspace:
    """The folder to write into (``path``) and the swap to the final name."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.preparing")
        self._replaced = out.with_name(f".{out.name}.replaced")

    def sweep(self) -> None:
        """Remove what a killed run left, and put back a dataset that it had moved aside but not yet
        replaced."""
        if self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)
        for leftover in (self.path, self._replaced):
            if leftover.exists():
                shutil.rmtree(leftover)

    def begin(self) -> None:
        """Create the empty work folder."""
        self.path.mkdir()

    def commit(self) -> None:
        """Give the work folder its final name; a dataset already there is moved aside first and removed
        after."""
        _sync_folder(self.path)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.path.rename(self.out)
        _sync_folder(self.out.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def discard(self) -> None:
        """Remove the work folder after a failure."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Workspace]:
    """Hold the lock of ``out`` and yield its swept workspace; on any exception the work is discarded.

    Raises ValueError when another process is preparing the same folder, or when ``out`` is a file or a folder
    with something else in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    handle = _take_lock(lock, out)
    space = Workspace(out)
    try:
        space.sweep()
        _check_replaceable(out)
        try:
            yield space
        except BaseException:
            space.discard()
            raise
    finally:
        lock.unlink()
        os.close(handle)


def _take_lock(lock: Path, out: Path) -> int:
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"another process is preparing {out}. What to do: wait for it, or choose another folder."
            ) from None
        # The holder before us removes the file: a lock on a removed file guards nothing.
        try:
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).exists()):
        raise ValueError(
            f"{out} exists and is not a prepared dataset, so it is left alone (even with --force). "
            "What to do: choose another folder."
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
