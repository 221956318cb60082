"""A step's timeline, measured and predicted, and both as a trace for Perfetto or chrome://tracing. Torch-free.

Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (complete events
``X`` with ``ts`` and ``dur`` in microseconds, metadata events ``M`` with names of processes and threads).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config.files import atomic_write_text
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.schedule import Kind, Plan, Queue, early_operations, update_operations
from pretrain.optim.offload.simulate import Timed, operation_bytes, simulate
from pretrain.optim.offload.subgroups import Subgroup

MODEL = "model"
FORWARD, BACKWARD, UPDATE = "forward", "last backward", "update: the model waits"
SHORTEST_STALL = 0.01
"""Of the update that a queue stands idle at least, to be shown as a stall."""


class Phase(NamedTuple):
    """What the model does, in seconds; 0 is when the gradient norm is known and the update begins."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Side:
    """A step as it was (``measured``) or was expected (``predicted``), in seconds, 0 as in :class:`Phase`.

    ``update_s``: until every weight is new, for which the model waits. ``exposed_s``: that, and what state flows back
    after the next forward pass.
    """

    name: str
    operations: tuple[Timed, ...]
    phases: tuple[Phase, ...]
    update_s: float
    exposed_s: float

    @property
    def start(self) -> float:
        return min((*(t.start for t in self.operations), *(p.start for p in self.phases)), default=0.0)

    @property
    def end(self) -> float:
        return max((*(t.end for t in self.operations), *(p.end for p in self.phases)), default=0.0)

    def stalls(self) -> list[tuple[Queue, float, float]]:
        """Gaps of every queue during the update, before the last operation that it has in it."""
        found = []
        for queue in Queue:
            at = 0.0
            for timed in sorted((t for t in self.operations if t.operation.queue is queue), key=lambda t: t.start):
                if at < timed.start <= self.update_s and timed.start - at > SHORTEST_STALL * self.update_s:
                    found.append((queue, at, timed.start))
                at = max(at, timed.end)
        return found


def measured_side(operations: Sequence[Timed], phases: Sequence[Phase], update_s: float, forward_s: float) -> Side:
    """``operations`` and ``phases`` relative to the beginning of the update."""
    flushed = max((t.end for t in operations if t.operation.kind is Kind.FLUSH), default=0.0)
    exposed_s = update_s + max(0.0, flushed - update_s - forward_s)
    return Side("measured", tuple(operations), (*phases, Phase(UPDATE, 0.0, update_s)), update_s, exposed_s)


def predicted_side(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    constants: Constants,
    widths: Widths,
    window: Window,
    *,
    serial: bool = False,
) -> Side:
    """What is expected of ``plan``. ``serial``: one operation after the other in the order of the program, as on the
    host, where nothing runs beside."""
    if serial:
        operations = _serial(plan, subgroups, constants, widths, early=window.backward_s > 0)
        update_s = max((timed.end for timed in operations), default=0.0)
        return Side("predicted", operations, (Phase(UPDATE, 0.0, update_s),), update_s, update_s)
    found = simulate(plan, subgroups, constants, widths, window)
    phases = [Phase(UPDATE, 0.0, found.update_s)]
    if window.backward_s:
        phases.append(Phase(BACKWARD, -window.backward_s, 0.0))
    if window.forward_s:
        phases.append(Phase(FORWARD, found.update_s, found.update_s + window.forward_s))
    return Side("predicted", found.operations, tuple(phases), found.update_s, found.exposed_s)


def _serial(
    plan: Plan, subgroups: Sequence[Subgroup], constants: Constants, widths: Widths, *, early: bool
) -> tuple[Timed, ...]:
    """``early``: what can be done before the update begins, is."""
    rates = {
        Kind.PREFETCH: constants.h2d,
        Kind.FLUSH: constants.d2h,
        Kind.CPU_UPDATE: constants.cpu_adam,
        Kind.DEVICE_UPDATE: constants.gpu_adam,
    }
    before = list(early_operations(plan))
    found: list[Timed] = []
    at = begin = 0.0
    for operation in [*before, *update_operations(plan, subgroups, host_weights=True, weight_down=False)]:
        if len(found) == len(before) and early:
            begin = at
        work = operation_bytes(operation, subgroups, widths) or subgroups[operation.subgroup].numel
        seconds = constants.latency + work / rates[operation.kind]
        found.append(Timed(operation, at, at + seconds))
        at += seconds
    return tuple(Timed(operation, start - begin, end - begin) for operation, start, end in found)


def link_rates(side: Side, subgroups: Sequence[Subgroup], widths: Widths) -> tuple[float, float]:
    """Bytes/s up and down while there is something under way in that direction; 0 where there never is."""
    rates = []
    for kinds in ((Kind.PREFETCH, Kind.WEIGHT_UP), (Kind.FLUSH, Kind.GRADIENT_DOWN, Kind.WEIGHT_DOWN)):
        moved, busy, until = 0, 0.0, float("-inf")
        for timed in sorted((t for t in side.operations if t.operation.kind in kinds), key=lambda t: t.start):
            moved += operation_bytes(timed.operation, subgroups, widths)
            busy += max(0.0, timed.end - max(timed.start, until))
            until = max(until, timed.end)
        rates.append(moved / busy if busy else 0.0)
    return rates[0], rates[1]


def write_trace(
    path: Path,
    sides: Sequence[Side],
    subgroups: Sequence[Subgroup],
    widths: Widths,
    *,
    rank: int,
    step: int,
) -> None:
    """Write ``sides`` as one JSON file: a process for each, with a track for the model and one for each queue.

    Raises:
        OSError: ``path`` cannot be written.
    """
    origin = min(side.start for side in sides)
    events: list[dict[str, Any]] = []
    for number, side in enumerate(sides):
        events += _events(side, len(sides) * rank + number, origin, subgroups, widths, rank=rank, order=number)
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "step": step,
            "rank": rank,
            "update_begins_us": _us(-origin),
            **{f"{side.name}_update_s": side.update_s for side in sides},
            **{f"{side.name}_exposed_s": side.exposed_s for side in sides},
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(trace, allow_nan=False))


def _events(
    side: Side,
    process: int,
    origin: float,
    subgroups: Sequence[Subgroup],
    widths: Widths,
    *,
    rank: int,
    order: int,
) -> Iterator[dict[str, Any]]:
    tracks = {MODEL: 0, **{queue.value: number for number, queue in enumerate(Queue, 1)}}

    def named(name: str, key: str, value: Any, thread: int = 0) -> dict[str, Any]:
        return {"name": name, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": {key: value}}

    def complete(name: str, category: str, track: str, start: float, end: float, **args: Any) -> dict[str, Any]:
        # From rounded ends: neighbours that overlap by a nanosecond are dropped when the file is read.
        begin = _us(start - origin)
        duration = round(_us(end - origin) - begin, 3)
        return {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": begin,
            "dur": duration,
            "pid": process,
            "tid": tracks[track],
            "args": args,
        }

    yield named("process_name", "name", f"rank {rank}: {side.name}")
    yield named("process_sort_index", "sort_index", 2 * rank + order)
    for track, thread in tracks.items():
        yield named("thread_name", "name", track, thread)
        yield named("thread_sort_index", "sort_index", thread, thread)
    for phase in side.phases:
        yield complete(phase.name, "phase", MODEL, phase.start, phase.end)
    for queue, start, end in side.stalls():
        yield complete("stall", "stall", queue.value, start, end)
    for timed in side.operations:
        operation = timed.operation
        args: dict[str, Any] = {
            "subgroup": operation.subgroup,
            "elements": subgroups[operation.subgroup].numel,
            "buffer": operation.buffer,
        }
        seconds = timed.end - timed.start
        if moved := operation_bytes(operation, subgroups, widths):
            args["bytes"] = moved
            if seconds > 0:
                args["GB/s"] = round(moved / seconds / 1e9, 3)
        elif seconds > 0:
            args["elements/s"] = round(args["elements"] / seconds)
        yield complete(
            f"{operation.kind.value} {operation.subgroup}",
            "operation",
            operation.queue.value,
            timed.start,
            timed.end,
            **args,
        )


def _us(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e6, 3)
