"""When the operations of each step ran, put together from what a device tells bit by bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pretrain.optim.offload.device import Clock, Device, Event, OperationTime
from pretrain.optim.offload.schedule import Kind, Plan, early_operations
from pretrain.optim.offload.simulate import Timed
from pretrain.optim.offload.timeline import BACKWARD, FORWARD, Phase, Side

MOST_PENDING = 3
"""Updates later, what is still missing of a step is not waited for."""


class TimedDevice(Device, Clock, Protocol):
    """A device that tells times."""


@dataclass(frozen=True)
class StepTimes:
    """A step's times in seconds, 0 where its update begins.

    ``predicted``: as it was expected. ``backward_s``: from the first prefetch to the update, ``gap_s``: from the end of
    the update before to that prefetch; None where not known.
    """

    number: int
    predicted: Side
    operations: tuple[Timed, ...]
    phases: tuple[Phase, ...]
    update_s: float
    backward_s: float | None
    gap_s: float | None


@dataclass
class _Pending:
    number: int
    plan: Plan
    num_operations: int
    predicted: Side
    early: Event | None
    begin: Event
    end: Event | None = None


class Recorder:
    """Follows steps on ``device``, which it never waits for."""

    def __init__(self, device: TimedDevice) -> None:
        self._device = device
        self._steps: deque[_Pending] = deque()
        self._loose: list[OperationTime] = []
        self._early: Event | None = None
        self._last_end: float | None = None
        device.measure(True)

    def before_early(self) -> None:
        self._early = self._device.mark()

    def before_update(self, number: int, plan: Plan, num_operations: int, predicted: Side) -> None:
        """``num_operations``: of this step, early ones included."""
        begin = self._device.mark()
        self._steps.append(_Pending(number, plan, num_operations, predicted, self._early, begin))
        self._early = None

    def after_update(self) -> None:
        self._steps[-1].end = self._device.mark()

    def settle(self, wants_next: Callable[[int], bool], *, last: bool = False) -> list[StepTimes]:
        """Steps of which all is known by now.

        Args:
            wants_next: of which step the forward pass after it is wanted, too.
            last: no more is to come.
        """
        self._loose += self._device.collect()
        done = []
        while self._steps and self._steps[0].end is not None:
            step = self._steps[0]
            begin, end = self._device.time(step.begin), self._device.time(step.end)
            if begin is None or end is None:
                break
            following = self._steps[1] if len(self._steps) > 1 else None
            taken = self._take(step, end, following)
            after = None if following is None else self._device.time(following.early or following.begin)
            # State that flows back may still be under way.
            misses = len(taken) < step.num_operations or (wants_next(step.number) and after is None)
            if misses and len(self._steps) < MOST_PENDING and not last:
                break
            self._steps.popleft()
            self._forget(taken, begin)
            done.append(self._times(step, taken, begin, end, after))
            self._last_end = end
        return done

    def close(self) -> None:
        self._device.measure(False)

    def _take(self, step: _Pending, end: float, following: _Pending | None) -> list[OperationTime]:
        """Operations of the earliest step; of those done twice, because a step was dropped, the later ones."""
        next_begin = None if following is None else self._device.time(following.begin)
        early = {(operation.kind, operation.subgroup) for operation in early_operations(step.plan)}
        if step.plan.early_gradients:
            early |= {(Kind.GRADIENT_DOWN, subgroup) for subgroup in step.plan.cpu_order}
        found: dict[tuple[Kind, int], OperationTime] = {}
        for time in self._loose:
            key = (time.operation.kind, time.operation.subgroup)
            if key in early:
                is_own = time.start < end
            elif next_begin is None:
                is_own = True
            elif key[0] is Kind.FLUSH:
                is_own = time.start < next_begin
            else:
                # Clocks of host and device agree to some microseconds only.
                is_own = time.start < (end + next_begin) / 2
            if is_own:
                found[key] = time
        return list(found.values())

    def _forget(self, taken: list[OperationTime], begin: float) -> None:
        chosen = {id(time) for time in taken}
        self._loose = [time for time in self._loose if id(time) not in chosen and time.start >= begin]

    def _times(
        self, step: _Pending, taken: list[OperationTime], begin: float, end: float, after: float | None
    ) -> StepTimes:
        early = None if step.early is None else self._device.time(step.early)
        phases = []
        if early is not None:
            phases.append(Phase(BACKWARD, early - begin, 0.0))
        if after is not None and after > end:
            phases.append(Phase(FORWARD, end - begin, after - begin))
        return StepTimes(
            number=step.number,
            predicted=step.predicted,
            operations=tuple(Timed(time.operation, time.start - begin, time.end - begin) for time in taken),
            phases=tuple(phases),
            update_s=end - begin,
            backward_s=None if early is None else begin - early,
            gap_s=None if early is None or self._last_end is None else early - self._last_end,
        )
