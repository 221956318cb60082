"""A dataset folder appears whole or not at all: work in a hidden sibling folder, then rename it.

For output ``DIR/name`` the work lies in ``DIR/.name.preparing`` under the lock ``DIR/.name.lock``. A killed run
leaves its finished work there, and the next run of the same preparation goes on from it. Files in the work
folder appear whole or not at all too: they are written under ``partial/`` and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.store.manifest import MANIFEST_NAME

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDERS = ("survey", "spill", "shards", "dataset", "partial")
_numbers = count()


@dataclass(frozen=True)
class Task:
    """Task ``index`` of ``count`` that share one preparation; raises ValueError for an index out of range."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"task {self.index} of {self.count}: tasks are numbered from 0 to {self.count - 1}")


def open_partial(path: Path) -> BinaryIO:
    """Create a file to be renamed when it is complete."""
    return open(path, "xb")


@dataclass(frozen=True)
class WorkFolder:
    """The files of one preparation, as the command and its processes use them; ``writer`` names who writes."""

    path: Path
    writer: str = "run"

    @property
    def dataset(self) -> Path:
        """The folder that will become the output."""
        return self.path / "dataset"

    @contextlib.contextmanager
    def create(self, name: str, *, first_wins: bool = False) -> Iterator[BinaryIO]:
        """Write the file ``name``: it appears, whole and on the disk, when the block ends without an error.

        An earlier file of that name is replaced, or with ``first_wins`` stays.
        """
        unique = f"{self.writer}-{os.getpid()}-{next(_numbers)}"
        # Some shared file systems link only within one folder.
        partial = (self.path / name).with_suffix(f".{unique}") if first_wins else self.path / "partial" / unique
        try:
            with open_partial(partial) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if first_wins:
                with contextlib.suppress(FileExistsError):
                    os.link(partial, self.path / name)
                partial.unlink()
            else:
                os.replace(partial, self.path / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def write(self, name: str, data: bytes, *, first_wins: bool = False) -> None:
        """Write a small file as :meth:`create`."""
        with self.create(name, first_wins=first_wins) as stream:
            stream.write(data)

    def write_json(self, name: str, tree: Any, *, first_wins: bool = False) -> None:
        """Write ``tree`` as JSON, as :meth:`create`."""
        self.write(name, json.dumps(tree).encode(), first_wins=first_wins)

    def read_json(self, name: str) -> Any:
        """Parse a file written by :meth:`write_json`; None when there is none."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


class Workspace:
    """The work folder of the output ``out`` while its lock is held, and the swap to the final name."""

    def __init__(self, out: Path, task: Task | None) -> None:
        self.out, self.task = out, task
        path = out.with_name(f".{out.name}.preparing")
        self.folder = WorkFolder(path, "run" if task is None else f"task{task.index}of{task.count}")
        self._replaced = out.with_name(f".{out.name}.replaced")
        self._task_lock: int | None = None

    def recover(self) -> None:
        """Put back a dataset that a killed run had moved aside but not yet replaced; remove one it had
        replaced."""
        if self._replaced.exists():
            if not self.out.exists():
                self._replaced.rename(self.out)
            else:
                shutil.rmtree(self._replaced)

    def begin(self) -> None:
        """Create the work folder, or take up the one that is there and sweep its partial files.

        Raises ValueError when another process is working on the same task.
        """
        for name in _FOLDERS:
            (self.folder.path / name).mkdir(parents=True, exist_ok=True)
        if self.task is not None and self._task_lock is None:
            self._task_lock = _lock(
                self.folder.path / f"{self.folder.writer}.lock", fcntl.LOCK_EX, f"task {self.task.index} of {self.out}"
            )
        pattern = "*" if self.task is None else f"{self.folder.writer}-*"
        for partial in (self.folder.path / "partial").glob(pattern):
            partial.unlink(missing_ok=True)

    def has_work(self) -> bool:
        """Whether anything that took long is finished."""
        return any(next((self.folder.path / name).glob("*.json"), None) for name in ("spill", "shards"))

    def commit(self) -> None:
        """Give the dataset its final name; one already there is moved aside first and removed after."""
        sync_folder(self.folder.dataset)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.folder.dataset.rename(self.out)
        sync_folder(self.out.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.folder.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock of the task."""
        if self._task_lock is not None:
            os.close(self._task_lock)


@contextlib.contextmanager
def workspace(out: Path, task: Task | None = None) -> Iterator[Workspace]:
    """Hold the lock of ``out`` (alone, or shared between tasks) and yield its workspace.

    What a failed block has finished stays for the next run, unless it is nothing to speak of.
    Raises ValueError when another process is preparing the same folder, or when ``out`` is a file or a folder
    with something else in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    handle = _lock(lock, fcntl.LOCK_EX if task is None else fcntl.LOCK_SH, str(out))
    space = Workspace(out, task)
    try:
        if task is None:
            space.recover()
        _check_replaceable(out)
        try:
            yield space
        except BaseException:
            if task is None and not space.has_work():
                space.discard()
            raise
    finally:
        space.close()
        # Tasks that still hold the lock keep the file: one who removed it would let others lock a new one.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink()
        os.close(handle)


def _lock(lock: Path, kind: int, what: str) -> int:
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"another process is preparing {what}. What to do: wait for it, or choose another folder."
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


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
