"""What the watching verbs share: finding the run, tables for terminals and pipes, short forms of numbers."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from launchers.watch.summary import RunSummary

STYLES = {
    "running": "green",
    "starting": "cyan",
    "pending": "yellow",
    "requeued": "yellow",
    "finished": "bold green",
    "stopped": "yellow",
    "cancelled": "magenta",
    "failed": "bold red",
    "lost": "bold red",
    "created": "dim",
}


def add_run_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``RUN`` and ``--root``."""
    what = "run directory, or the name (or its unique beginning) of one below --root"
    if several:
        parser.add_argument("runs", metavar="RUN", nargs="+", help=what)
    else:
        parser.add_argument("run", metavar="RUN", help=what)
    add_root_argument(parser)


def add_root_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="runs", help="folder that holds run directories (default: runs)")


def guarded(action: Callable[[], int]) -> int:
    """Run a verb: faults that its user can mend in one line, and no complaint when a reader of the pipe has left."""
    from pretrain.training.failure import guarded as guarded_failures

    try:
        code = guarded_failures(action)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter would complain as well when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def is_terminal() -> bool:
    """Whether a person sees what is printed, and colours and redrawing make sense."""
    return sys.stdout.isatty()


def make_console() -> Console:
    """Standard output as rich sees it: wrapped to the terminal, but never cut in a pipe."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not is_terminal())


def warn(message: str) -> None:
    print(f"pretrain: {message}", file=sys.stderr, flush=True)


# ---- tables ------------------------------------------------------------------------------------------------------


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), foldable: Sequence[str] = ()
) -> None:
    """A table: with rich on a terminal, where columns of ``foldable`` wrap; else aligned text, two blanks between.

    Columns that are empty in all rows are left out; ``right`` names those that are aligned to the right.
    """
    kept = [i for i, header in enumerate(headers) if any(row[i] not in ("", "-") for row in rows)]
    names = [headers[i] for i in kept]
    cells = [[row[i] for i in kept] for row in rows]
    if is_terminal():
        _print_rich(names, cells, right, foldable)
    else:
        print(plain_table(names, cells, right))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lines of aligned columns, headers first."""
    table = [[header.upper() for header in headers], *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    lines = []
    for row in table:
        parts = [
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(row, widths, headers, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _print_rich(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], foldable: Sequence[str]
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold dim")
    for header in headers:
        is_foldable = header in foldable
        table.add_column(
            header,
            justify="right" if header in right else "left",
            no_wrap=not is_foldable,
            overflow="fold",
            ratio=None,
        )
    for row in rows:
        table.add_row(
            *(
                Text(cell, style=_style(header, cell), overflow="fold")
                for header, cell in zip(headers, row, strict=True)
            )
        )
    make_console().print(table)


def _style(header: str, cell: str) -> str:
    if header == "state":
        return STYLES.get(cell.split(" ")[0], "")
    if header in ("last exit", "ended") and cell not in ("finished", "interrupted", "-", ""):
        return "yellow"
    return ""


# ---- JSON --------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """``value`` as JSON any reader takes: numbers that JSON lacks become the texts of ``metrics.jsonl``."""
    print(json.dumps(plain_json(value), indent=1, allow_nan=False, ensure_ascii=False))


def plain_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


# ---- short forms -------------------------------------------------------------------------------------------------


def short_duration(seconds: float | None) -> str:
    """At most two units: ``42s``, ``5m08s``, ``3h12m``, ``2d04h``; ``-`` for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def age(when: float | None, now: float) -> str:
    """How long ago, in one unit: ``3s``, ``5m``, ``2h``, ``6d``; ``-`` for None."""
    if when is None:
        return "-"
    seconds = max(0.0, now - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def short_count(value: float | None) -> str:
    """Three digits or so: ``950``, ``12.3k``, ``4.56M``, ``1.2G``; ``-`` for None."""
    if value is None or not math.isfinite(value):
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def short_nodes(names: Sequence[str]) -> str:
    """Node names as Slurm writes them: ``gpu[01-03,07],login1``."""
    groups: dict[tuple[str, int], list[int]] = {}
    for name in names:
        digits = re.search(r"[0-9]{1,9}$", name)
        suffix = digits.group() if digits else ""
        groups.setdefault((name[: len(name) - len(suffix)], len(suffix)), []).append(int(suffix or -1))
    words = []
    for (prefix, width), numbers in groups.items():
        ranges: list[tuple[int, int]] = []
        for number in sorted(set(numbers)):
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], number)
            else:
                ranges.append((number, number))
        inside = ",".join(
            f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else "") for first, last in ranges
        )
        is_one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
        words.append(prefix + ("" if not width else inside if is_one else f"[{inside}]"))
    return ",".join(words) or "-"


def short_bytes(value: float) -> str:
    """In the binary unit that leaves one to four digits: ``7.9 GiB``."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


def short_loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def progress(summary: RunSummary) -> str:
    """``120/600``; a part that is not known is ``-``."""
    step = "-" if summary.step is None else str(summary.step)
    return f"{step}/{summary.steps}" if summary.steps is not None else step
