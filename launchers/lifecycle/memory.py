"""Did the kernel kill something for memory? From its own counters, which grow with each such kill. Torch-free."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pretrain.parallel.control_groups import memory_groups


@dataclass(frozen=True)
class OomKills:
    """``count`` processes that the kernel has killed for memory; ``anyone_s``: those of others on this machine, too."""

    count: int
    anyone_s: bool = False


def oom_kills(root: Path = Path("/")) -> OomKills | None:
    """Processes that the kernel has killed for memory, in this control group or, without one, on this machine.

    None where the kernel does not tell.
    """
    for path in _event_files(root):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return OomKills(int(value), anyone_s=path == root / "proc/vmstat")
    return None


def _event_files(root: Path) -> list[Path]:
    names = {1: "memory.oom_control", 2: "memory.events"}
    files = [group.folder / names[group.version] for group in memory_groups(root)]
    return [*files, root / "sys/fs/cgroup/memory.events", root / "proc/vmstat"]
