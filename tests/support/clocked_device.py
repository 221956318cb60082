"""A small training on a device with a clock of its own, which tells the times that the simulator gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.device import Event, InlineDevice, OperationTime
from pretrain.optim.offload.online import Online, shape_widths
from pretrain.optim.offload.plan import make_plan
from pretrain.optim.offload.schedule import Operation, Plan
from pretrain.optim.offload.simulate import simulate
from pretrain.optim.offload.states import SLOTS, GroupSettings, OffloadedStates
from pretrain.optim.offload.subgroups import Target, cut_subgroups

TRUTH = Constants(50e9, 48e9, 44e9, 43e9, 0.85, 2.2e9, 1.7e9, 8e10, 0.0)
ROOM = Window(device_bytes=10**6)
SLOW_LINK = dataclasses.replace(TRUTH, h2d=5e9, d2h=5e9, h2d_duplex=4.5e9, d2h_duplex=4.5e9)
SETTINGS = [GroupSettings(1e-2, (0.9, 0.95), 1e-8, 0.1)]
SIZE, SUBGROUP = 1_000, 100


class _Mark:
    def __init__(self, time: float) -> None:
        self.time = time


class ClockedDevice(InlineDevice):
    """Does everything at once, but tells the times that the simulator gives for ``truth``. Nothing waits.

    ``late``: what is asked for is over only once the next step has begun, as on a device that the host runs ahead of.
    """

    host_weights = False

    def __init__(self, truth: Constants, *, backward_s: float = 0.0, late: bool = False) -> None:
        super().__init__()
        self.truth = truth
        self.backward_s = backward_s
        self.late = late
        self.now = 0.0
        self.seen = 0.0
        self.plan: Callable[[], Plan] | None = None
        self.widths = WIDTHS
        self._given: list[Operation] = []
        self._told: list[OperationTime] = []

    def run(self, operation: Any, waits: Any, work: Callable[[], None]) -> Event:
        self._given.append(operation)
        return super().run(operation, waits, work)

    def mark(self) -> Event:
        return _Mark(self.now)

    def hold(self, events: Any) -> None:
        if not list(events) or self.plan is None:
            return
        window = Window(backward_s=self.backward_s)
        found = simulate(self.plan(), cut_subgroups([Target(SIZE, 0)], SUBGROUP), self.truth, self.widths, window)
        by_key = {(t.operation.kind, t.operation.subgroup): t for t in found.operations}
        for operation in self._given:
            timed = by_key[operation.kind, operation.subgroup]
            self._told.append(OperationTime(operation, self.now + timed.start, self.now + timed.end))
        self._given = []
        self.now += found.update_s

    def collect(self) -> list[OperationTime]:
        over = [t for t in self._told if t.end <= self._visible]
        self._told = [t for t in self._told if t.end > self._visible]
        return over

    def time(self, event: Any) -> float | None:
        return event.time if event.time <= self._visible else None

    @property
    def _visible(self) -> float:
        return self.seen if self.late else math.inf


WIDTHS = Widths(state=12, gradient=4, weight=2)


class Run:
    """A small training on a :class:`ClockedDevice`. One forward and one backward pass take ``pass_s`` each."""

    def __init__(self, device: ClockedDevice, plan: Plan, config: OffloadConfig, *, watch: bool = True, **online: Any):
        generator = torch.Generator().manual_seed(3)
        self.device = device
        self.weight = torch.randn(SIZE, generator=generator).to(torch.bfloat16)
        self._generator = generator
        self.states = OffloadedStates(
            [self.weight], [0], config, gradient_dtype=torch.float32, device=device, plan=plan
        )
        device.plan, device.widths = lambda: self.states.plan, shape_widths(self.states.shape)
        self.journal: list[dict[str, Any]] = []
        self.online: Online | None = None
        if watch:
            self.online = Online(self.states, journal=self.journal.append, **{"constants": TRUTH, **online})
            self.states.watcher = self.online
        self._steps = 0

    def step(self, count: int = 1, *, early: bool = True) -> None:
        for _ in range(count):
            self._steps += 1
            self.device.now += self.device.backward_s  # the forward pass, as long
            gradient = torch.randn(SIZE, generator=self._generator)
            if early:
                self.states.start_early()
            self.device.seen = self.device.now
            self.device.now += self.device.backward_s
            self.states.update([gradient], SETTINGS, self._steps)

    def values(self) -> list[torch.Tensor]:
        return [self.weight.clone(), *(self.states.read(0, slot) for slot in SLOTS)]


def offload_config(**changes: Any) -> OffloadConfig:
    return dataclasses.replace(OffloadConfig(enabled=True, subgroup_size=SUBGROUP), **changes)


def plan_of(constants: Constants = TRUTH, window: Window = ROOM, **asked: Any) -> Plan:
    return make_plan(
        cut_subgroups([Target(SIZE, 0)], SUBGROUP), constants, WIDTHS, window, resident_fraction=0.0, **asked
    ).plan
