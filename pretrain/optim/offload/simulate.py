"""Times of a plan: its operations run on a fluid model of links, CPU and device. Torch-free.

Queues run in order, operations wait as :class:`~pretrain.optim.offload.schedule.Order` says, and each progresses at a
rate that depends on what else runs at that moment:

- Operations of one link direction share its rate equally. It is the rate of one way alone, or of both ways at once when
  the other direction is busy, times ``link_with_cpu`` while the CPU updates.
- The CPU updates at ``cpu_adam``; at ``cpu_adam_with_link`` while both directions are busy; with one busy direction it
  takes the mean of both times for an element.
- Every operation begins with ``latency`` seconds in which it uses nothing.

:func:`run_tasks` is the event loop by itself; it knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from typing import NamedTuple

from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.schedule import (
    Kind,
    Operation,
    Order,
    Place,
    Plan,
    Queue,
    early_operations,
    gradient_operation,
    update_operations,
)
from pretrain.optim.offload.subgroups import Subgroup


class Lane(IntEnum):
    """What an operation uses. Work is in bytes on ``UP`` and ``DOWN``, in elements on ``CPU``, in seconds elsewhere."""

    UP = 0
    DOWN = 1
    CPU = 2
    OTHER = 3


class Task(NamedTuple):
    """``work`` on a lane, after the earlier tasks of its queue, those numbered in ``after``, and time ``release``."""

    queue: Hashable
    lane: Lane
    work: float
    after: tuple[int, ...] = ()
    release: float = 0.0


class Span(NamedTuple):
    start: float
    end: float


Rates = Callable[[int, int, int], tuple[float, float, float]]


def rates_of(constants: Constants) -> Rates:
    """Rates of one operation of lanes ``UP``, ``DOWN``, ``CPU`` by the numbers of operations that run on each."""
    both, alone = 1 / constants.cpu_adam_with_link, 1 / constants.cpu_adam

    def rates(up: int, down: int, cpu: int) -> tuple[float, float, float]:
        factor = constants.link_with_cpu if cpu else 1.0
        busy = (up > 0) + (down > 0)
        return (
            (constants.h2d_duplex if down else constants.h2d) * factor / max(up, 1),
            (constants.d2h_duplex if up else constants.d2h) * factor / max(down, 1),
            1 / (alone + (both - alone) * busy / 2) / max(cpu, 1),
        )

    return rates


def run_tasks(tasks: Sequence[Task], rates: Rates, latency: float) -> list[Span]:
    """Start and end of every task. Time begins with the earliest ``release``.

    Raises:
        ValueError: a task waits for itself, a later one, or one that does not exist.
    """
    waiting, followers = _dependencies(tasks)
    spans: list[Span] = [Span(0.0, 0.0)] * len(tasks)
    releases: list[tuple[float, int]] = []
    for number, task in enumerate(tasks):
        if not waiting[number]:
            heappush(releases, (task.release, number))
    now = releases[0][0] if releases else 0.0
    counts = [0, 0, 0, 0]
    table: dict[tuple[int, int, int], tuple[float, float, float, float]] = {}
    # Running operations: [work left, lane, task, start]. A lane of OTHER with its task's number below zero is latency.
    running: list[list] = []
    while releases or running:
        while releases and releases[0][0] <= now:
            _, number = heappop(releases)
            if latency:
                running.append([latency, 3, -1 - number, now])
            else:
                lane = int(tasks[number].lane)
                counts[lane] += 1
                running.append([tasks[number].work, lane, number, now])
        key = (counts[0], counts[1], counts[2])
        speed = table.get(key)
        if speed is None:
            speed = table[key] = (*rates(*key), 1.0)
        step = releases[0][0] - now if releases else float("inf")
        first = None
        for operation in running:
            needed = operation[0] / speed[operation[1]]
            if needed <= step:
                step, first = needed, operation
        now += step
        finished = []
        for operation in running:
            left = operation[0] - speed[operation[1]] * step
            # What ends at the same moment, but for rounding, ends now.
            if operation is first or left <= 1e-12 * speed[operation[1]]:
                finished.append(operation)
            else:
                operation[0] = left
        for operation in finished:
            number = operation[2]
            if number < 0:
                number = -1 - number
                operation[:3] = tasks[number].work, int(tasks[number].lane), number
                counts[operation[1]] += 1
                continue
            running.remove(operation)
            counts[operation[1]] -= 1
            spans[number] = Span(operation[3], now)
            for follower in followers[number]:
                waiting[follower] -= 1
                if not waiting[follower]:
                    heappush(releases, (max(now, tasks[follower].release), follower))
    return spans


def _dependencies(tasks: Sequence[Task]) -> tuple[list[int], list[list[int]]]:
    waiting = [0] * len(tasks)
    followers: list[list[int]] = [[] for _ in tasks]
    last: dict[Hashable, int] = {}
    for number, task in enumerate(tasks):
        for before in task.after:
            if not 0 <= before < number:
                raise ValueError(f"task {number} waits for task {before}, expected an earlier one")
        needed = set(task.after)
        if task.queue in last:
            needed.add(last[task.queue])
        last[task.queue] = number
        waiting[number] = len(needed)
        for before in needed:
            followers[before].append(number)
    return waiting, followers


class Timed(NamedTuple):
    """An operation with its start and end in seconds; 0 is when the gradient norm is known."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What :func:`simulate` found.

    ``update_s``: from 0 until every weight is new. ``exposed_s``: what a step takes longer than without an update:
    that, and what state flows back after the next forward pass is over. ``end_s``: end of the last operation.
    ``busy``: share of ``update_s`` in which a queue is busy. ``up_bytes``, ``down_bytes``: over the link, early ones
    too. ``peak_slots``: most device buffers that hold state at once.
    """

    operations: tuple[Timed, ...]
    update_s: float
    exposed_s: float
    end_s: float
    busy: Mapping[Queue, float]
    up_bytes: int
    down_bytes: int
    peak_slots: int

    def by_queue(self) -> dict[Queue, list[Timed]]:
        """Operations of every queue, as they ran."""
        found: dict[Queue, list[Timed]] = {}
        for timed in self.operations:
            found.setdefault(timed.operation.queue, []).append(timed)
        return found


_LANES = {
    Kind.PREFETCH: Lane.UP,
    Kind.WEIGHT_UP: Lane.UP,
    Kind.FLUSH: Lane.DOWN,
    Kind.GRADIENT_DOWN: Lane.DOWN,
    Kind.WEIGHT_DOWN: Lane.DOWN,
    Kind.CPU_UPDATE: Lane.CPU,
    Kind.DEVICE_UPDATE: Lane.OTHER,
}


def operation_bytes(operation: Operation, subgroups: Sequence[Subgroup], widths: Widths) -> int:
    """Bytes that ``operation`` moves over the link; 0 for an update."""
    numel = subgroups[operation.subgroup].numel
    if operation.kind in (Kind.PREFETCH, Kind.FLUSH):
        return numel * widths.state
    if operation.kind is Kind.GRADIENT_DOWN:
        return numel * widths.gradient
    if operation.kind in (Kind.WEIGHT_UP, Kind.WEIGHT_DOWN):
        return numel * widths.weight
    return 0


def simulate(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    constants: Constants,
    widths: Widths,
    window: Window,
    *,
    host_weights: bool = False,
) -> Timeline:
    """Times of one step under ``plan``.

    Early prefetches begin ``window.backward_s`` before 0. With ``early_gradients`` gradients become final in that time
    at an even rate, those of the last subgroup first, and go to the host as they do. Updates begin at 0.
    """
    tasks, operations = _tasks(plan, subgroups, constants, widths, window, host_weights)
    spans = run_tasks(tasks, rates_of(constants), constants.latency)
    new = flushed = 0.0
    busy = dict.fromkeys(Queue, 0.0)
    moved = [0, 0]
    holds: list[tuple[float, int]] = []
    for operation, task, span in zip(operations, tasks, spans, strict=True):
        if task.lane is Lane.UP or task.lane is Lane.DOWN:
            moved[task.lane] += int(task.work)
        if operation.kind is Kind.FLUSH:
            flushed = max(flushed, span.end)
            holds.append((span.end, -1))
        else:
            new = max(new, span.end)
        if operation.kind is Kind.PREFETCH:
            holds.append((span.start, 1))
    for operation, span in zip(operations, spans, strict=True):
        busy[operation.queue] += max(0.0, min(span.end, new) - max(span.start, 0.0))
    peak = held = 0
    for _, change in sorted(holds):
        held += change
        peak = max(peak, held)
    return Timeline(
        operations=tuple(Timed(operation, *span) for operation, span in zip(operations, spans, strict=True)),
        update_s=new,
        exposed_s=new + max(0.0, flushed - new - window.forward_s),
        end_s=max(new, flushed),
        busy={queue: share / new if new else 0.0 for queue, share in busy.items()},
        up_bytes=moved[Lane.UP],
        down_bytes=moved[Lane.DOWN],
        peak_slots=peak,
    )


def _tasks(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    constants: Constants,
    widths: Widths,
    window: Window,
    host_weights: bool,
) -> tuple[list[Task], list[Operation]]:
    """The operations of a step and, of each, what it does when; waits are those of :class:`Order`."""
    released: list[tuple[float, Operation]] = [(-window.backward_s, o) for o in early_operations(plan)]
    if plan.early_gradients and not host_weights:
        released += _early_gradients(plan, subgroups, window.backward_s)
    # All early operations are issued before 0; their two queues are independent of each other.
    released += [
        (0.0, operation)
        for operation in update_operations(plan, subgroups, host_weights=host_weights, weight_down=widths.weight_down)
    ]
    order: Order[int] = Order()
    tasks: list[Task] = []
    operations: list[Operation] = []
    for release, operation in released:
        lane = _LANES[operation.kind]
        if lane is Lane.CPU:
            work: float = subgroups[operation.subgroup].numel
        elif lane is Lane.OTHER:
            work = subgroups[operation.subgroup].numel / constants.gpu_adam
        else:
            work = operation_bytes(operation, subgroups, widths)
        tasks.append(Task(operation.queue, lane, work, tuple(order.waits(operation)), release))
        order.issued(operation, len(operations))
        operations.append(operation)
    return tasks, operations


def _early_gradients(plan: Plan, subgroups: Sequence[Subgroup], backward_s: float) -> list[tuple[float, Operation]]:
    """Gradient operations of CPU-updated subgroups with the times at which the gradients are final."""
    total = sum(subgroup.numel for subgroup in subgroups)
    found: list[tuple[float, Operation]] = []
    done = 0
    for subgroup in reversed(subgroups):
        done += subgroup.numel
        if plan.places[subgroup.index] is Place.CPU:
            found.append((backward_s * (done / total - 1), gradient_operation(plan, subgroup.index)))
    return found
