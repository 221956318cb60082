"""Progress of a verb on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Progress on stderr: a rich bar on a terminal, else a line per phase and at each further quarter of
    it."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, object] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=total)
                bar.update(tasks[phase], completed=done)  # type: ignore[arg-type]

            yield show
        return
    reached: dict[str, int] = {}
    started = time.monotonic()

    def log(phase: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if reached.get(phase) != quarter:
            reached[phase] = quarter
            print(
                f"[{time.monotonic() - started:6.1f} s] {phase}: {25 * quarter} %",
                file=sys.stderr,
                flush=True,
            )

    yield log
