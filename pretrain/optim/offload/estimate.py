"""Constants re-estimated from the times of operations while training runs. Torch-free.

How fast an operation goes depends on what runs beside it, and that changes while it goes on. So no rate can be read
off: constants are fitted, so that they explain how long every operation of a step took beside the others. Each step
moves them a part of the way (Gauss-Newton in logarithms of rates); outliers of a step count little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from pretrain.optim.offload.constants import Constants, Widths
from pretrain.optim.offload.schedule import Kind
from pretrain.optim.offload.simulate import Timed, operation_bytes
from pretrain.optim.offload.subgroups import Subgroup

WEIGHT = 0.2
"""Share of the way to what a step says. The first step's counts whole: what the constants were before was a guess."""
LATENCIES = 5.0
"""Operations that take less than so many latencies tell nothing of a rate."""
SPREAD = 0.1
"""Deviations of so much, as a share of the time, or of the usual for the step, are no outliers."""
_LONGEST_WAY = math.log(4.0)  # of one step

# What is fitted, each the logarithm of a factor on the constants of the beginning: of a direction, and besides where
# the other one is busy; of both directions where the CPU is busy; of the CPU, and besides with both directions; device.
UP, UP_DUPLEX, DOWN, DOWN_DUPLEX, BESIDE_CPU, CPU, CPU_BESIDE, DEVICE = range(8)
# Where a step does not tell which it was, a lane as a whole has changed, not the effect of company on it.
_DAMPING = tuple(3e-2 if number in (UP_DUPLEX, DOWN_DUPLEX, BESIDE_CPU, CPU_BESIDE) else 1e-4 for number in range(8))


class State(NamedTuple):
    """``lane``: up, down, cpu or device. ``busy``: directions of the link that are busy besides; ``cpu``: so is the
    CPU."""

    lane: str
    busy: int = 0
    cpu: bool = False


_LANES = {
    Kind.PREFETCH: "up",
    Kind.WEIGHT_UP: "up",
    Kind.FLUSH: "down",
    Kind.GRADIENT_DOWN: "down",
    Kind.WEIGHT_DOWN: "down",
    Kind.CPU_UPDATE: "cpu",
    Kind.DEVICE_UPDATE: "device",
}


class _Row(NamedTuple):
    """An operation: by what factor (logarithm) it did more than expected, how that depends on what is fitted."""

    lane: str
    error: float
    slopes: list[float]
    weight: float


class Estimate:
    """Follows rates, beginning with ``prior``."""

    def __init__(self, prior: Constants, subgroups: Sequence[Subgroup], widths: Widths) -> None:
        self._prior = prior
        self._subgroups = subgroups
        self._widths = widths
        self._factors = [0.0] * 8
        self._is_first = True

    def add(self, operations: Sequence[Timed]) -> None:
        """Learn from the operations of one step, all of them, timed on one clock."""
        # From a guess several rounds lead to what a step says, and another step would only repeat it.
        for _ in range(8 if self._is_first else 1):
            rows = self._rows(operations)
            if not rows:
                return
            step = _solved(rows)
            share = 1.0 if self._is_first else WEIGHT
            self._factors = [
                factor + share * max(-_LONGEST_WAY, min(_LONGEST_WAY, change))
                for factor, change in zip(self._factors, step, strict=True)
            ]
            # The CPU's work does not make the link faster.
            self._factors[BESIDE_CPU] = min(self._factors[BESIDE_CPU], -math.log(self._prior.link_with_cpu))
        self._is_first = False

    @property
    def constants(self) -> Constants:
        """As they seem now; what is never seen goes with what is most like it."""
        prior, factors = self._prior, [math.exp(factor) for factor in self._factors]
        return replace(
            prior,
            h2d=prior.h2d * factors[UP],
            h2d_duplex=prior.h2d_duplex * factors[UP] * factors[UP_DUPLEX],
            d2h=prior.d2h * factors[DOWN],
            d2h_duplex=prior.d2h_duplex * factors[DOWN] * factors[DOWN_DUPLEX],
            link_with_cpu=min(1.0, prior.link_with_cpu * factors[BESIDE_CPU]),
            cpu_adam=prior.cpu_adam * factors[CPU],
            cpu_adam_with_link=prior.cpu_adam_with_link * factors[CPU] * factors[CPU_BESIDE],
            gpu_adam=prior.gpu_adam * factors[DEVICE],
        )

    def _rows(self, operations: Sequence[Timed]) -> list[_Row]:
        constants, rows = self.constants, []
        known: dict[State, tuple[float, list[float]]] = {}
        for timed, parts in zip(operations, _parts(operations), strict=True):
            work, seconds = self._work(timed), timed.end - timed.start
            latency = self._prior.latency
            if seconds <= 0 or seconds <= LATENCIES * latency or not work:
                continue
            # Latency is at the beginning; which state that was in does not matter much.
            scale = (seconds - latency) / seconds
            told = {}
            for state in parts:
                if state not in known:
                    known[state] = _told(constants, state)
                told[state] = known[state]
            done = {state: time * scale * told[state][0] for state, time in parts.items()}
            total = sum(done.values())
            slopes = [sum(done[s] * told[s][1][number] for s in done) / total for number in range(8)]
            # Weighed by the time that was expected, so that no outlier weighs the more for its length.
            rows.append(_Row(_LANES[timed.operation.kind], math.log(work / total), slopes, seconds * work / total))
        return rows

    def _work(self, timed: Timed) -> float:
        operation = timed.operation
        if operation.kind in (Kind.CPU_UPDATE, Kind.DEVICE_UPDATE):
            return self._subgroups[operation.subgroup].numel
        return operation_bytes(operation, self._subgroups, self._widths)


def _told(constants: Constants, state: State) -> tuple[float, list[float]]:
    """Rate in ``state``, and what its logarithm gains with each of the factors. As in the simulator."""
    slopes = [0.0] * 8
    if state.lane == "device":
        slopes[DEVICE] = 1.0
        return constants.gpu_adam, slopes
    if state.lane == "cpu":
        # With one direction busy the mean of both times for an element.
        alone, both = (1 - state.busy / 2) / constants.cpu_adam, state.busy / 2 / constants.cpu_adam_with_link
        slopes[CPU], slopes[CPU_BESIDE] = 1.0, both / (alone + both)
        return 1 / (alone + both), slopes
    is_up = state.lane == "up"
    slopes[UP if is_up else DOWN] = 1.0
    slopes[UP_DUPLEX if is_up else DOWN_DUPLEX] = float(state.busy)
    slopes[BESIDE_CPU] = float(state.cpu)
    alone, duplex = (constants.h2d, constants.h2d_duplex) if is_up else (constants.d2h, constants.d2h_duplex)
    return (duplex if state.busy else alone) * (constants.link_with_cpu if state.cpu else 1.0), slopes


def _solved(rows: Sequence[_Row]) -> list[float]:
    """Changes of the factors that explain the errors best, by weighted least squares with damping."""
    weights = [0.0] * len(rows)
    for lane in {row.lane for row in rows}:
        numbers = [number for number, row in enumerate(rows) if row.lane == lane]
        middle = median(rows[number].error for number in numbers)
        spread = max(SPREAD, 1.5 * median(abs(rows[number].error - middle) for number in numbers))
        total = sum(rows[number].weight for number in numbers)
        for number in numbers:
            away = abs(rows[number].error - middle)
            weights[number] = rows[number].weight / total * min(1.0, (spread / away) ** 2 if away else 1.0)
    matrix = [[0.0] * 8 + [0.0] for _ in range(8)]
    for row, weight in zip(rows, weights, strict=True):
        entries = [(number, slope) for number, slope in enumerate(row.slopes) if slope]
        for i, slope in entries:
            for j, other in entries:
                matrix[i][j] += weight * slope * other
            matrix[i][8] += weight * slope * row.error
    for i in range(8):
        matrix[i][i] += _DAMPING[i]
    return _eliminated(matrix)


def _eliminated(matrix: list[list[float]]) -> list[float]:
    """Solution of linear equations, the right side as the last column; positive definite, so no pivots are needed."""
    size = len(matrix)
    for i in range(size):
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            if factor:
                matrix[j] = [b - factor * a for a, b in zip(matrix[i], matrix[j], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (matrix[i][size] - sum(matrix[i][j] * found[j] for j in range(i + 1, size))) / matrix[i][i]
    return found


def _parts(operations: Sequence[Timed]) -> list[dict[State, float]]:
    """Of each operation the seconds that it had to itself by state: shared time counts by its share."""
    found: list[dict[State, float]] = [{} for _ in operations]
    lanes = [_LANES[timed.operation.kind] for timed in operations]
    edges = sorted(
        (
            (time, change, number)
            for number, timed in enumerate(operations)
            if timed.end > timed.start
            for time, change in ((timed.start, 1), (timed.end, -1))
        ),
        # What ends makes room for what begins at the same moment.
        key=lambda edge: edge[:2],
    )
    running: set[int] = set()
    counts = dict.fromkeys(("up", "down", "cpu", "device"), 0)
    before = edges[0][0] if edges else 0.0
    for time, change, number in edges:
        if time > before:
            up, down, cpu = (counts[name] > 0 for name in ("up", "down", "cpu"))
            states = {
                "up": State("up", int(down), cpu),
                "down": State("down", int(up), cpu),
                "cpu": State("cpu", up + down),
                "device": State("device"),
            }
            for other in running:
                lane = lanes[other]
                found[other][states[lane]] = found[other].get(states[lane], 0.0) + (time - before) / counts[lane]
            before = time
        if change > 0:
            running.add(number)
        else:
            running.discard(number)
        counts[lanes[number]] += change
    return found
