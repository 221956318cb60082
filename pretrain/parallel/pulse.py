"""What this process is doing right now, written by whoever does it and read by the heartbeat. Torch-free.

One object per process, because it tells of the process: engines, checkpoints and the loop mark it with plain attribute
writes (well below a microsecond), and nothing is written to disk here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Phase and progress of this process.

    ``phase`` is one of those of :mod:`launchers.heartbeat`, entered at ``since`` (unix seconds); ``detail`` says more
    about it. ``progress`` grows with every sign of work. ``step`` is the last completed step of the run (None: not
    known yet), ``steps`` the number that this attempt completed.
    """

    __slots__ = ("detail", "phase", "progress", "since", "step", "steps")

    def __init__(self) -> None:
        self.phase = "start"
        self.detail = ""
        self.since = time.time()
        self.progress = 0
        self.step: int | None = None
        self.steps = 0

    def enter(self, phase: str, detail: str = "") -> None:
        """Another phase begins."""
        self.phase = phase
        self.detail = detail
        self.since = time.time()
        self.progress += 1

    def tick(self) -> None:
        """A sign of work within a phase."""
        self.progress += 1

    def completed(self, step: int) -> None:
        """An optimizer step of the run is complete."""
        self.step = step
        self.steps += 1
        self.progress += 1

    @contextmanager
    def during(self, phase: str, detail: str = "") -> Iterator[None]:
        """A phase inside another one, which comes back at the end; after a failure the inner one stays to be seen."""
        before, before_detail = self.phase, self.detail
        self.enter(phase, detail)
        yield
        self.enter(before, before_detail)


PULSE = Pulse()
