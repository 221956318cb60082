"""When the ranks must be asked to stop so that their last checkpoint is whole before the job's end. Torch-free.

The time that a save takes is measured: every ``checkpoint`` event in ``metrics.jsonl`` tells its own. Until there is
one, ``lifecycle.first_save_s`` is taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from launchers.lifecycle.exit_class import ExitClass, StopReason
from pretrain.config.launch_schema import LifecycleConfig
from pretrain.tracking.metrics_log import MetricsTail, Record

SLACK_S = 5.0
"""For what lies between the request and the save, and between the save and the end of the processes."""

_RECENT_SAVES = 5
_RECENT_STEPS = 50
_STEPS_FOR_ONE_OUTLIER = 4
_LOOK_BACK_BYTES = 1 << 24


@dataclass
class Pace:
    """How long saves and steps of a run take, read from its records as they come."""

    path: Path
    saves: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_SAVES))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _tail: MetricsTail | None = None

    def update(self) -> None:
        """Takes in what was written since the last call; at the first, the last 16 MiB."""
        if self._tail is None:
            size = 0
            with contextlib.suppress(OSError):
                size = os.stat(self.path).st_size
            self._tail = MetricsTail(self.path, max(0, size - _LOOK_BACK_BYTES))
        with contextlib.suppress(OSError):  # a file system that stalls; the next look tries again
            self.take(self._tail.read())

    def take(self, records: Iterable[Record]) -> None:
        for record in records:
            if record["event"] == "checkpoint" and isinstance(record.get("seconds"), int | float):
                self.saves.append(float(record["seconds"]))
            elif record["event"] == "train" and "step_s" in record.get("metrics", {}):
                self.steps.append(float(record["metrics"]["step_s"]))

    def slow_step_s(self) -> float:
        """The slowest step of late, but for a single one: a stall that came once would claim a part of every later
        allocation, while steps that are slow time and again come twice."""
        slowest = sorted(self.steps, reverse=True)
        return slowest[1 if len(slowest) >= _STEPS_FOR_ONE_OUTLIER else 0] if slowest else 0.0

    def least_s(self) -> float:
        """Seconds that a stop takes by what was measured, without margin; 0 until a save has been measured."""
        return max(self.saves) + self.slow_step_s() + SLACK_S if self.saves else 0.0

    def lead_s(self, config: LifecycleConfig) -> float:
        """Seconds before the end at which the ranks must be asked: margin x save, a slow step, slack."""
        save = max(self.saves, default=config.first_save_s)
        return config.save_margin * save + self.slow_step_s() + SLACK_S

    def stop_time(self, config: LifecycleConfig, *, began: float, end: float) -> float:
        """Unix time at which to ask, for an allocation that ends at ``end`` and an attempt that began at ``began``.

        A lead that would leave the attempt less than half of its time is cut to that half, for margin and first guess
        may be too careful, and an attempt that stops at once gets nowhere; but never below what was measured.
        """
        half = began + (end - began) / 2
        return max(end - self.lead_s(config), min(half, end - self.least_s()))

    def time_enough(self, config: LifecycleConfig, *, now: float, end: float | None, startup: float) -> bool:
        """Whether the rest of an allocation is worth another attempt: start-up (seconds) and lead fit twice.

        ``end`` None: the allocation has no end.
        """
        return end is None or end - now > 2 * (self.lead_s(config) + startup)


def lead_s(metrics_path: Path, config: LifecycleConfig) -> float:
    """:meth:`Pace.lead_s` of a run as it is now: for the signal that is asked of Slurm at submission."""
    pace = Pace(metrics_path)
    pace.update()
    return pace.lead_s(config)


class Deadline:
    """Asks for a stop when the time that a checkpoint needs is all that is left of the allocation."""

    INTERVAL_S = 2.0

    def __init__(self, metrics_path: Path, config: LifecycleConfig, end_time: Callable[[], float | None]) -> None:
        """``end_time`` gives the allocation's end in unix seconds, None while it has none."""
        self._config = config
        self._end_time = end_time
        self._pace = Pace(metrics_path)
        self._began = time.time()
        self._next = 0.0

    def poll(self) -> StopReason | None:
        now = time.time()
        if now < self._next:
            return None
        self._next = now + self.INTERVAL_S
        # An administrator may have moved the end meanwhile; the back end asks Slurm as seldom as it sees fit.
        end = self._end_time()
        if end is None:
            return None
        self._pace.update()
        if now < self._pace.stop_time(self._config, began=self._began, end=end):
            return None
        left = max(0.0, end - now)
        return StopReason(ExitClass.TIME_LIMIT, f"the job's time limit is {left:.0f} s away")
