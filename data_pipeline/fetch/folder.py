"""The node-local cache folder, shared by all processes of a node without a server.

Layout of ``FOLDER/segments-1``::

    lock              held for the short time in which room is made or a plan is written; holds the sum of sizes
    plans/TOKEN       what one living process needs next, nearest first; locked by it as long as it lives
    entries/KEY       one byte range and the xxh3 hash of its bytes; KEY is a hash of data set, name, start, stop
    entries/KEY.part  being fetched; locked by its process

All locks are ``flock`` locks: the kernel drops them with their process, however it ends. A part becomes an entry by
one rename, so entries are whole; they are not synced, so after a power loss one may not be, which its size, its hash
or the caller's ``verify`` tells. A file that is removed while another process reads it stays readable to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from data_pipeline.fetch.eviction import Entry, Needs, choose_victims
from data_pipeline.fetch.storage import ByteRange

TRAILER_BYTES = 8
_LAYOUT = "segments-1"
_PART = ".part"
# Freed beyond what is required, as a share of the cap, so that a full cache is not searched for every entry.
_SLACK_SHARE = 64


class CorruptEntryError(Exception):
    """An entry is not what was written."""


class CacheFullError(Exception):
    """The disk has no room and there is nothing left to evict."""


def make_private(folder: Path) -> Path:
    """``folder``, made for this user alone (mode 0700): its name is known to all and its place open to all.

    One that cannot be made is left to who uses it. Raises ValueError for one that another user owns: what lies in it
    would be taken for data.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # Of a link both count: another user could have it lead to a folder of this one.
        for status in (os.lstat(folder), os.stat(folder)):
            if status.st_uid != os.getuid():
                raise ValueError(
                    f"cache folder {folder} is owned by user {status.st_uid}, but this is user {os.getuid()}. What to "
                    "do: set fetch.cache_folder to a folder of your own on a local disk, or have that one removed."
                )
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.chmod(folder, 0o700)
    except OSError:
        pass
    return folder


class CacheFolder:
    """Entries of one data set (``identity``) in a folder that others use too.

    ``max_bytes`` caps all entries together; ``reserve_bytes`` of the disk stay free. Thread-safe.
    Raises ValueError when the folder cannot be made or written.
    """

    def __init__(self, folder: Path, identity: str, max_bytes: int, reserve_bytes: int) -> None:
        self._root = folder / _LAYOUT
        self._entries, self._plans, self._lock = (self._root / name for name in ("entries", "plans", "lock"))
        self._dataset = _hash(identity, 8)
        self._max_bytes, self._reserve_bytes = max_bytes, reserve_bytes
        self._own: list[str] = []
        self._plan_file: int | None = None
        self._plan_path: Path | None = None
        self._locked_files: set[int] = set()
        self.evictions = self.evicted_bytes = 0
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._plans.mkdir(exist_ok=True)
            with self.ledger() as ledger:
                self._scan(ledger)
        except OSError as error:
            raise ValueError(
                f"cache folder {folder} cannot be used: {error.strerror}. What to do: name a folder on a local disk "
                "of each node that this user may write, or none."
            ) from None

    def key(self, wanted: ByteRange) -> str:
        """The file name of a range: safe whatever the range's own name is."""
        return f"{self._dataset}-{_hash(f'{wanted.start} {wanted.stop} {wanted.name}', 16)}"

    def publish(self, keys: Sequence[str]) -> None:
        """Tell all processes what this one needs next, nearest first."""
        self._own = list(keys)
        with contextlib.suppress(OSError), self.ledger():  # on a full disk the plan is known to this process only
            if self._plan_file is None:
                self._plan_path = self._plans / f"{os.getpid()}-{secrets.token_hex(8)}"
                self._plan_file = os.open(self._plan_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._plan_file, fcntl.LOCK_EX)
            content = "\n".join([self._dataset, *keys]).encode()
            os.ftruncate(self._plan_file, len(content))
            os.pwrite(self._plan_file, content, 0)

    def passed(self, key: str) -> None:
        """This process has read ``key``: what follows in its plan is one read nearer."""
        own = list(self._own)  # replaced, not changed: another thread may be reading it
        with contextlib.suppress(ValueError):
            own.remove(key)
        self._own = own

    def has(self, key: str) -> bool:
        """Whether the entry is there."""
        return (self._entries / key).exists()

    def load(self, key: str, length: int, check: bool) -> bytes | None:
        """The ``length`` bytes of an entry, None when it is not there; ``check`` compares them with their hash.

        Raises CorruptEntryError.
        """
        try:
            descriptor = os.open(self._entries / key, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(descriptor).st_size != length + TRAILER_BYTES:
                raise CorruptEntryError
            data = _read_all(descriptor, length)
            if check and _read_all(descriptor, TRAILER_BYTES) != xxhash.xxh3_64_digest(data):
                raise CorruptEntryError
            with contextlib.suppress(OSError):  # another user's entry
                os.utime(descriptor)
            return data
        except OSError:
            raise CorruptEntryError from None
        finally:
            os.close(descriptor)

    def discard(self, key: str) -> None:
        """Remove an entry."""
        with contextlib.suppress(OSError):
            os.unlink(self._entries / key)

    @contextlib.contextmanager
    def hold(self, key: str, wait: bool) -> Iterator[Slot | None]:
        """The right to fetch ``key``, which one thread of one process has at a time.

        When another has it: waits for it to end, or gives None without ``wait``. Afterwards look again whether the
        entry is there now. Raises OSError when the folder cannot be written.
        """
        path = self._entries / (key + _PART)
        while True:
            with self._locked(path, wait) as descriptor:
                if descriptor is None:
                    yield None
                    return
                if not _same_file(descriptor, path):
                    continue  # it became an entry, or was given up, while this thread waited
                os.ftruncate(descriptor, 0)
                slot = Slot(self, key, path, descriptor)
                try:
                    yield slot
                finally:
                    slot.clean()
                return

    def make_room(self, key: str, size: int, descriptor: int) -> bool:
        """Evict what is needed later than ``key`` until ``size`` bytes fit, and take them for the open file.

        Returns False when everything cached is needed sooner. Raises CacheFullError when the disk has no room.
        """
        with self.ledger() as ledger:
            total = _read_ledger(ledger)
            if max(total + size - self._max_bytes, self._lacking(size)) > 0:
                entries, total = self._scan(ledger)
                over_cap, lacking = total + size - self._max_bytes, self._lacking(size)
                freed = self._evict(entries, key, max(over_cap, lacking))
                total -= freed
                _write_ledger(ledger, total)
                if freed < over_cap:
                    return False
                if freed < lacking:
                    raise CacheFullError
            try:
                _allocate(descriptor, size)
            except OSError:
                os.ftruncate(descriptor, 0)
                entries, total = self._scan(ledger)
                total -= self._evict(entries, key, size)
                _write_ledger(ledger, total)
                try:
                    _allocate(descriptor, size)
                except OSError:
                    os.ftruncate(descriptor, 0)
                    raise CacheFullError from None
            _write_ledger(ledger, total + size)
            return True

    def close(self) -> None:
        """Withdraw the plan."""
        if self._plan_file is not None and self._plan_path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._plan_path)
            os.close(self._plan_file)
            self._plan_file = None

    def after_fork(self) -> None:
        """A child publishes a plan of its own, and lets go of its parent's locks: they must end with the parent."""
        inherited = {*self._locked_files, *([] if self._plan_file is None else [self._plan_file])}
        for descriptor in inherited:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._locked_files, self._plan_file = set(), None

    def _evict(self, entries: list[Entry], key: str, required: int) -> int:
        if required <= 0:
            return 0
        victims = choose_victims(entries, self._needs(), key, required, self._max_bytes // _SLACK_SHARE)
        freed = sum(entry.size for entry in victims)
        if freed < required:
            return 0  # it would not fit anyway
        for entry in victims:
            self.discard(entry.key)
        self.evictions += len(victims)
        self.evicted_bytes += freed
        return freed

    def _needs(self) -> Needs:
        plans, live = [self._own], {self._dataset}
        for path in self._plans.iterdir():
            if path == self._plan_path:
                continue
            with contextlib.suppress(OSError), open(path, "rb") as stream:
                if _is_free(stream.fileno()):
                    path.unlink()  # its process is gone
                    continue
                dataset, *keys = stream.read().decode("ascii", "replace").split("\n")
                live.add(dataset)
                plans.append(keys)
        distances: dict[str, int] = {}
        for plan in plans:
            for distance, needed in enumerate(plan):
                if distance < distances.get(needed, distance + 1):
                    distances[needed] = distance
        return Needs(distances, frozenset(live))

    def _scan(self, ledger: int) -> tuple[list[Entry], int]:
        """All entries, and the bytes that they and living parts take. Removes parts that no process holds."""
        entries, total = [], 0
        with os.scandir(self._entries) as listing:
            for item in listing:
                with contextlib.suppress(FileNotFoundError):
                    found = item.stat()
                    if item.name.endswith(_PART) and _is_stale(item.path):
                        os.unlink(item.path)
                        continue
                    total += found.st_size
                    if not item.name.endswith(_PART):
                        dataset = item.name.partition("-")[0]
                        entries.append(Entry(dataset, item.name, found.st_size, found.st_mtime_ns))
        _write_ledger(ledger, total)
        return entries, total

    def _lacking(self, size: int) -> int:
        """Bytes that must leave the disk before ``size`` more fit beside the reserve."""
        disk = os.statvfs(self._root)
        return size + self._reserve_bytes - disk.f_bavail * disk.f_frsize

    @contextlib.contextmanager
    def ledger(self) -> Iterator[int]:
        """Holds the folder's lock: meanwhile nobody makes room or entries."""
        with self._locked(self._lock) as descriptor:
            assert descriptor is not None  # it waited
            yield descriptor

    @contextlib.contextmanager
    def _locked(self, path: Path, wait: bool = True) -> Iterator[int | None]:
        """Holds the file's lock; gives its descriptor, None when another has it and ``wait`` is False."""
        # Opened anew each time, so that the lock also excludes other threads of this process.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._locked_files.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield descriptor
        finally:
            # Closing alone would leave the lock with a child that was forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            self._locked_files.discard(descriptor)
            os.close(descriptor)


class Slot:
    """The exclusive right to fetch one entry; made by :meth:`CacheFolder.hold`."""

    def __init__(self, folder: CacheFolder, key: str, part: Path, descriptor: int) -> None:
        self._folder, self._key, self._part, self._descriptor = folder, key, part, descriptor
        self._kept = False

    def make_room(self, length: int) -> bool:
        """See :meth:`CacheFolder.make_room`; ``length`` of the range."""
        return self._folder.make_room(self._key, length + TRAILER_BYTES, self._descriptor)

    def keep(self, data: bytes) -> None:
        """Write the bytes and make them an entry. Raises OSError; then nothing is left behind."""
        _write_all(self._descriptor, data, 0)
        _write_all(self._descriptor, xxhash.xxh3_64_digest(data), len(data))
        with self._folder.ledger():  # a directory read during a rename may show neither name
            os.rename(self._part, self._part.with_name(self._key))
        self._kept = True

    def clean(self) -> None:
        """Remove what was not kept."""
        if not self._kept:
            with contextlib.suppress(OSError):
                os.unlink(self._part)


def _hash(text: str, digest_size: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=digest_size).hexdigest()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_free(descriptor: int) -> bool:
    """Whether nobody holds the file's lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_stale(path: str) -> bool:
    with open(path, "rb") as stream:
        return _is_free(stream.fileno())


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _read_all(descriptor: int, length: int) -> bytes:
    """The next ``length`` bytes; raises CorruptEntryError when there are fewer."""
    pieces, left = [], length
    while left:
        piece = os.read(descriptor, left)
        if not piece:
            raise CorruptEntryError
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_ledger(descriptor: int) -> int:
    raw = os.pread(descriptor, 8, 0)
    return struct.unpack("<q", raw)[0] if len(raw) == 8 else 1 << 62  # unknown: the first use looks


def _write_ledger(descriptor: int, total: int) -> None:
    with contextlib.suppress(OSError):  # the next use finds too much or nothing, and looks
        os.pwrite(descriptor, struct.pack("<q", total), 0)
