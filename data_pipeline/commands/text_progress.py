"""Progress of preparing text on stderr: rates, time left, and what is dropped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.prepare.metering import Progress, Status

_LINE_SECONDS = 30.0


@contextmanager
def show_text_progress() -> Iterator[Progress]:
    """A rich bar for each phase on a terminal; else a line at each further quarter, and every 30 seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[details]}"))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, object] = {}

            def show(status: Status) -> None:
                if status.phase not in tasks:
                    tasks[status.phase] = bar.add_task(status.phase, total=1.0, details="")
                bar.update(tasks[status.phase], completed=status.fraction, details=describe(status))  # type: ignore[arg-type]

            yield show
        return
    reached: dict[str, int] = {}
    shown: dict[str, float] = {}
    started = time.monotonic()

    def log(status: Status) -> None:
        quarter, now = int(4 * status.fraction), time.monotonic()
        if reached.get(status.phase) != quarter or now - shown[status.phase] >= _LINE_SECONDS:
            reached[status.phase], shown[status.phase] = quarter, now
            print(f"[{now - started:6.1f} s] {status.phase}: {describe(status)}", file=sys.stderr, flush=True)

    yield log


def describe(status: Status) -> str:
    """One line: share done, rates of this run, time left, documents dropped by reason."""
    counts, seconds = status.counts, max(status.seconds, 1e-9)
    parts = [f"{int(100 * status.fraction)} % of {_amount(status)}"]
    if counts.documents:
        parts.append(f"{counts.documents / seconds:,.0f} documents/s")
    if counts.bytes:
        parts.append(f"{counts.bytes / seconds / 1e6:,.1f} MB/s")
    tokens = counts.tokens or counts.written
    if tokens:
        parts.append(f"{tokens / seconds / 1e6:,.2f} M tokens/s")
    if status.eta_seconds is not None and status.fraction < 1:
        parts.append(f"ETA {_clock(status.eta_seconds)}")
    if counts.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.dropped.items()))
        parts.append(f"{sum(counts.dropped.values()):,} dropped ({reasons})")
    return ", ".join(parts)


def _amount(status: Status) -> str:
    if status.unit != "bytes":
        return f"{status.total:,} {status.unit}"
    return f"{status.total / 1e9:,.1f} GB" if status.total >= 1e9 else f"{status.total / 1e6:,.1f} MB"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
