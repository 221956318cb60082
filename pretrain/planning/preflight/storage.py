"""Concern: the run root takes what a run does to it, tried out for real. Torch-free.

Permission bits say little on network file systems: a folder is made, a file written, synced and renamed, and all of it
removed again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.files import fsync_directory
from pretrain.planning.preflight.findings import Finding, error, ok, warning
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import duration

TRIAL_BYTES = 1 << 20
"""Enough for blocks to be allocated: a full disk still takes empty files and a few bytes."""
_SLOW_S = 2.0
_SKEW_S = 30.0
"""Difference of clocks that the lease of a run directory still tolerates with ease."""
_IN_MEMORY = ("tmpfs", "ramfs")

_REASONS: dict[int, tuple[str, str]] = {
    errno.EROFS: ("is on a file system that is mounted read-only", "choose another run.root, or have it mounted rw"),
    errno.ENOSPC: ("is on a full disk (no space, or no inodes, left)", "free space there, or choose another run.root"),
    errno.EDQUOT: ("is over the disk quota", "free space there, have the quota raised, or choose another run.root"),
    errno.EACCES: ("may not be written by this user", "choose another run.root, or have its permissions changed"),
    errno.EPERM: ("may not be written by this user", "choose another run.root, or have its permissions changed"),
    errno.ENOTDIR: ("lies below something that is a file", "choose another run.root"),
    errno.EEXIST: ("has a file in its way", "choose another run.root, or move the file"),
    errno.ENAMETOOLONG: ("has too long a name for the file system", "choose a shorter run.root"),
    errno.ESTALE: ("is on a network file system that has lost it (stale handle)", "have it mounted anew"),
    errno.EIO: ("is on a disk that fails (input/output error)", "choose another run.root; tell whoever runs the disk"),
    errno.ENOTCONN: ("is on a network file system that is not connected", "have it mounted anew"),
}


class Trial:
    """What can be done in ``folder``, one operation after the other; everything made is removed again."""

    def __init__(self, folder: Path) -> None:
        self._inside = folder / f".preflight-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.operation = "make a folder"
        self.skew_s = 0.0

    def run(self) -> None:
        """Raises OSError; :attr:`operation` then says what could not be done."""
        started = time.time()
        self._inside.mkdir()
        try:
            self._operations(started)
        finally:
            shutil.rmtree(self._inside, ignore_errors=True)

    def _operations(self, started: float) -> None:
        self.operation = "refuse a folder that exists (locks rest on that)"
        with contextlib.suppress(FileExistsError):
            self._inside.mkdir()
            raise OSError(errno.EIO, "making a folder twice succeeded")
        first, second = self._inside / "first", self._inside / "second"
        self.operation = "write and sync a file"
        data = os.urandom(TRIAL_BYTES)
        with open(first, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self.skew_s = first.stat().st_mtime - started
        self.operation = "rename a file onto another"
        second.write_bytes(b"")
        os.replace(first, second)
        self.operation = "read back what was written"
        if second.read_bytes() != data:
            raise OSError(errno.EIO, "other bytes came back than were written")
        self.operation = "sync a folder"
        fsync_directory(self._inside)
        self.operation = "rename a folder"
        inner = self._inside / "folder"
        inner.mkdir()
        inner.rename(self._inside / "renamed")


def check(subject: Subject) -> Iterator[Finding]:
    """The trial where the run will write, and what kind of place that is."""
    place, what = subject.place, "run.root" if subject.run is None and subject.path is None else "run directory"
    folder = nearest_folder(place)
    trial = Trial(folder)
    started = time.monotonic()
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            trial.operation = "make a folder"
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        trial.run()
    except OSError as fault:
        yield _failure(what, place, folder, trial.operation, fault)
        return
    seconds = time.monotonic() - started
    missing = "" if folder == place else f" (tried in {folder}; the rest will be made)"
    yield ok(
        what,
        f"{place}{missing}: made, wrote, synced, renamed and removed in {duration(seconds)}",
        seconds=seconds,
    )
    if seconds > _SLOW_S:
        yield warning(
            what,
            f"{duration(seconds)} for a few small operations in {folder}",
            f"less than {_SLOW_S:g} s",
            "a less busy file system; checkpoints and metrics would be slow here",
            seconds=seconds,
        )
    yield from _surroundings(subject, what, folder, trial.skew_s)


def _failure(what: str, place: Path, folder: Path, operation: str, fault: OSError) -> Finding:
    reason, fix = _REASONS.get(
        fault.errno or 0, (f"does not take what a run writes ({fault.strerror or fault})", "choose another run.root")
    )
    if fault.errno == errno.ENOSPC:
        reason += _room(folder)
    where = f"{place}" if folder == place else f"{place} (nearest folder that exists: {folder})"
    return error(what, f"{where} {reason}; failed to {operation}: {fault}", "a folder that can be written", fix)


def _room(folder: Path) -> str:
    with contextlib.suppress(OSError):
        facts = os.statvfs(folder)
        inodes = f", {facts.f_favail:,} of {facts.f_files:,} inodes" if facts.f_files else ""
        return f": {facts.f_bavail * facts.f_frsize:,} bytes{inodes} free"
    return ""


def _surroundings(subject: Subject, what: str, folder: Path, skew_s: float) -> Iterator[Finding]:
    kind = file_system(folder)
    if kind in _IN_MEMORY and subject.slurm is not None:
        yield warning(
            what,
            f"{folder} is {kind}, memory of this host",
            "a file system that all nodes share, and that outlives them",
            "run.root=/PATH/ON/SHARED/STORAGE",
        )
    elif kind in _IN_MEMORY:
        yield warning(what, f"{folder} is {kind}, memory of this host", "a disk", "choose another run.root")
    if abs(skew_s) > _SKEW_S:
        yield warning(
            what,
            f"the clock of its file system is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this host's",
            "clocks that agree within seconds: leases and heartbeats are compared by time",
            "have the clocks synchronised (NTP, chrony)",
            skew_s=skew_s,
        )


def nearest_folder(path: Path) -> Path:
    """``path``, or what exists of it; may be a file, or a folder that cannot be looked into."""
    while True:
        try:
            path.lstat()
            return path
        except OSError:
            if path == path.parent:
                return path
            path = path.parent


def file_system(folder: Path) -> str:
    """Type of the file system of a folder (``ext4``, ``nfs4``, ``lustre``); empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        resolved = folder.resolve()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ").replace("\\011", "\t")
        # Of mounts on the same folder the last one counts.
        if resolved.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind
