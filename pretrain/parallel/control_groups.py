"""Memory that the control groups of this process account and limit, version 2 and memory of version 1. Torch-free.

Functions take the ``root`` of the file system below which ``proc`` and ``sys`` lie, so that one can be made up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LIMIT_AND_USE = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
# Caches of files, which the kernel gives up before it kills; shared memory is not among them.
_RECLAIMABLE = {
    2: ("active_file", "inactive_file", "slab_reclaimable"),
    1: ("total_active_file", "total_inactive_file"),
}
_UNLIMITED = 1 << 60
"""Version 1 writes a number of pages near 2**63 where there is no limit."""


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that accounts memory: its folder, and that of the hierarchy it is in (``version`` 1 or 2)."""

    version: int
    base: Path
    folder: Path


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a control group may use, uses, and would get back from caches of files when it needed them."""

    limit: int
    used: int
    reclaimable: int

    @property
    def room(self) -> int:
        return self.limit - self.used + min(self.reclaimable, self.used)


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """The groups that this process is in; none where the kernel does not tell."""
    groups = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                version, base = 2, root / "sys/fs/cgroup"
            elif "memory" in controllers.split(","):
                version, base = 1, root / "sys/fs/cgroup/memory"
            else:
                continue
            groups.append(MemoryGroup(version, base, base / path.strip("/")))
    return groups


def memory_limits(root: Path = Path("/")) -> Iterator[MemoryLimit]:
    """Every limit that holds for this process, from its own group up: one may stand on any level above it."""
    for group in memory_groups(root):
        parents = (parent for parent in group.folder.parents if parent.is_relative_to(group.base))
        for place in (group.folder, *parents):
            try:
                limit, used = ((place / name).read_text().strip() for name in _LIMIT_AND_USE[group.version])
            except OSError:
                continue
            if limit.isdigit() and int(limit) < _UNLIMITED:
                yield MemoryLimit(int(limit), int(used), _reclaimable(place, group.version))


def memory_room(root: Path = Path("/")) -> int | None:
    """Bytes that this process's control groups still allow; None without a limit."""
    return min((limit.room for limit in memory_limits(root)), default=None)


def _reclaimable(folder: Path, version: int) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in _RECLAIMABLE[version]:
                total += int(value)
    return total
