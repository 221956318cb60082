"""What disk quotas leave, from the commands that sites have for them. Torch-free."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 10.0
_KIB = 1024


@dataclass(frozen=True)
class Quota:
    """One limit: ``whose`` (such as ``user alice on /lustre``), and how many bytes and files are left (None: no
    limit)."""

    whose: str
    bytes_left: int | None
    files_left: int | None


def quotas(folder: Path, file_system: str) -> list[Quota]:
    """Quotas that hold in ``folder``; none where there are none or where they cannot be read."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # user ids without a name, as in containers
        return []
    mount = str(mount_point(folder))
    if file_system == "lustre" and shutil.which("lfs"):
        found: list[Quota] = []
        for option, kind in (("-u", "user"), ("-g", "group")):
            name = user if kind == "user" else _group()
            lines = _output(["lfs", "quota", "-q", option, name, mount])
            found.extend(parse(lines, {mount}, f"{kind} {name}"))
        return found
    if shutil.which("quota"):
        # -w: one line each, -p: times as numbers; network file systems are listed by their source.
        names = {mount, _source(mount)}
        return list(parse(_output(["quota", "-w", "-p", "-u"]), names, f"user {user}"))
    return []


def parse(lines: Sequence[str], names: set[str], whose: str) -> Iterator[Quota]:
    """Rows ``NAME blocks quota limit grace files quota limit grace`` (blocks of 1 KiB, ``*`` behind what is exceeded,
    0 for no limit) of the file systems ``names``."""
    for line in lines:
        fields = line.split()
        if len(fields) < 8 or fields[0] not in names:
            continue
        numbers = [_number(text) for text in fields[1:9]]
        blocks, block_soft, block_hard = numbers[:3]
        # `lfs` shows "-" and `quota -p` 0 for no grace, so files stand at the same place in both.
        files, file_soft, file_hard = numbers[4:7]
        if blocks is None or files is None:
            continue
        yield Quota(
            f"{whose} on {fields[0]}",
            _left(blocks, block_soft, block_hard, _KIB),
            _left(files, file_soft, file_hard, 1),
        )


def mount_point(folder: Path) -> Path:
    """Where the file system of a folder is mounted."""
    path = folder.resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def _left(used: int, soft: int | None, hard: int | None, unit: int) -> int | None:
    limit = hard or soft
    return max(limit - used, 0) * unit if limit else None


def _number(text: str) -> int | None:
    text = text.rstrip("*").strip("[]")  # Lustre brackets what some of its servers did not tell
    return int(text) if text.isdigit() else None


def _group() -> str:
    import grp
    import os

    try:
        return grp.getgrgid(os.getgid()).gr_name
    except KeyError:
        return str(os.getgid())


def _source(mount: str) -> str:
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return mount
    return next(
        (fields[0] for fields in map(str.split, reversed(lines)) if len(fields) > 1 and fields[1] == mount), mount
    )


def _output(command: list[str]) -> list[str]:
    try:
        # Being over a quota is an exit code of its own: what is printed counts.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()
