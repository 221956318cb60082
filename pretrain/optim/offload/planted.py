"""Defects to plant into the executor, so that the checks can show that they find them.

Each is a subclass of the executor (or of its order of waits, or of the simulated device) with one thing wrong. Those
numbered (i) to (v) are in a published artifact of interleaved offloading; the others are what else can go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.device import Event
from pretrain.optim.offload.executor import Executor
from pretrain.optim.offload.schedule import Kind, Operation, Order, Plan, Resource
from pretrain.optim.offload.simulated import SimulatedDevice
from pretrain.optim.offload.simulated_queues import Task
from pretrain.optim.offload.states import OffloadedStates
from pretrain.optim.offload.trials import Training, Way


class _WithOrder(Executor):
    """Takes ``order`` for its waits."""

    order: type[Order[Event]] = Order

    def set_plan(self, plan: Plan) -> None:
        super().set_plan(plan)
        self._order = self.order()


class _NoWaits(Order[Event]):
    """Operations of ``kinds`` wait for no other queue."""

    kinds: tuple[Kind, ...] = ()

    def waits(self, operation: Operation) -> list[Event]:
        return [] if operation.kind in self.kinds else super().waits(operation)


class _HalfStaged(Executor):
    """(i) Updated weights are staged as FP16 and their bytes copied into weights of another 16-bit type."""

    def _staged(self, operation: Operation) -> Tensor:
        staged = super()._staged(operation)
        wrong = operation.kind is Kind.CPU_UPDATE and staged.dtype == torch.bfloat16
        return staged.view(torch.float16) if wrong else staged


class _NoWeightUpWait(_NoWaits):
    kinds = (Kind.WEIGHT_UP,)


class _UnawaitedUpdate(_WithOrder):
    """(ii) Weights go up without waiting for the CPU's update."""

    order = _NoWeightUpWait


class _NoFlushWait(_NoWaits):
    kinds = (Kind.FLUSH,)


class _FlushUnordered(_WithOrder):
    """(iii) Nothing orders the device's update before the flush."""

    order = _NoFlushWait


class _NoDeviceWait(_NoWaits):
    kinds = (Kind.DEVICE_UPDATE,)


class _PrefetchUnordered(_WithOrder):
    """(iii) Nothing orders the prefetch before the device's update."""

    order = _NoDeviceWait


class _LastUnflushed(Executor):
    """(iv) The last streamed subgroup is never flushed."""

    def set_plan(self, plan: Plan) -> None:
        super().set_plan(plan)
        flushes = [operation for operation in self._operations if operation.kind is Kind.FLUSH]
        self._operations = [operation for operation in self._operations if operation is not flushes[-1]]


def _unwritten_moments(states: OffloadedStates) -> None:
    """(v) Moments begin as what happens to be in memory."""
    memory = states._memory
    for subgroup in states.subgroups:
        home = memory.home(subgroup.index)
        fresh = states.device.empty_host(home.numel())
        moments = 8 * subgroup.numel
        fresh[moments:].copy_(home[moments:])
        memory._homes[subgroup.index] = fresh


class _Forgetful(Executor):
    """State is prefetched for a step without waiting for the flush of the step before."""

    def update(self, gradients: Sequence[Tensor | None], scalars: Sequence[StepScalars]) -> None:
        super().update(gradients, scalars)
        self._order = Order()


class _NoSlotOrder(Order[Event]):
    def waits(self, operation: Operation) -> list[Event]:
        if operation.kind is Kind.PREFETCH:
            state: list[Resource] = [resource for resource in operation.reads if resource.name == "state"]
            return super().waits(Operation(operation.kind, operation.subgroup, reads=tuple(state)))
        return super().waits(operation)


class _SlotReused(_WithOrder):
    """A slot of the ring is filled again before it was flushed."""

    order = _NoSlotOrder


class _NoGradientWait(_NoWaits):
    kinds = (Kind.GRADIENT_DOWN,)


class _GradientOverwritten(_WithOrder):
    """A host buffer takes the next gradient while the CPU still reads the last one."""

    order = _NoGradientWait


class _ForwardTooSoon(SimulatedDevice):
    """The next forward pass does not wait for weights on their way up."""

    def hold(self, events: Iterable[Event]) -> None:
        super().hold([event for event in events if not (isinstance(event, Task) and "weight up" in event.name)])


class _NothingHeld(SimulatedDevice):
    """The model does not wait for the update at all, and reuses the memory of gradients."""

    def hold(self, events: Iterable[Event]) -> None:
        super().hold([])


class _ReleasedTooSoon(Executor):
    """Early slots are given back when their flush was issued, not when it is over."""

    def _release(self, slot: int, event: Event) -> None:
        super()._release(slot, self._device.mark())


class _TakenTooSoon(Executor):
    """Early slots are filled although the model's last use of their memory may not be over."""

    def _issue(self, operation: Operation, marker: Event, work: Callable[[], None]) -> Event:
        if operation.kind is not Kind.PREFETCH:
            return super()._issue(operation, marker, work)
        event = self._device.run(operation, self._order.waits(operation), work)
        self._order.issued(operation, event)
        return event


class _CpuSideUnmarked(Executor):
    """The CPU's side is ordered after the gradients it was sent, not after the end of the backward pass."""

    def _issue(self, operation: Operation, marker: Event, work: Callable[[], None]) -> Event:
        if operation.kind not in (Kind.WEIGHT_DOWN, Kind.CPU_UPDATE, Kind.WEIGHT_UP):
            return super()._issue(operation, marker, work)
        event = self._device.run(operation, self._order.waits(operation), work)
        self._order.issued(operation, event)
        return event


class _BuffersUnawaited(Executor):
    """Before a new plan it is waited for state and weights, not for host buffers."""

    def synchronize(self) -> None:
        for name in ("state", "weight"):
            self._device.finish(self._order.pending(name))


@dataclass(frozen=True)
class Defect:
    """``change``: what is done to sound states; ``device``: in place of the sound device; ``suits``: whether a training
    and a way of going through it can show it at all."""

    what: str
    suits: Callable[[Training, Way], bool]
    executor: type[Executor] | None = None
    device: type[SimulatedDevice] = SimulatedDevice
    prepare: Callable[[OffloadedStates], None] | None = None

    def change(self, states: OffloadedStates) -> None:
        if self.prepare is not None:
            self.prepare(states)
        if self.executor is not None:
            executor = states._executor
            executor.__class__ = self.executor
            executor.set_plan(states.plan)


def _updates(training: Training) -> int:
    """Steps that update everything, without one between that is dropped or looked at."""
    return sum(all(step.given) and not step.dropped and not step.looks for step in training.steps)


def _plain(training: Training, way: Way) -> bool:
    plain = _updates(training) == len(training.steps) >= 2
    return plain and way.second_plan is None


def _has_cpu(training: Training, way: Way) -> bool:
    return _plain(training, way) and bool(way.plan.cpu_order)


def _reuses_gradient_buffers(training: Training, way: Way) -> bool:
    # From step to step the model lies between: it waits for the CPU's updates.
    in_step = len(way.plan.cpu_order) > way.plan.num_host_buffers and not way.plan.early_gradients
    return _plain(training, way) and in_step


def _has_stream(training: Training, way: Way) -> bool:
    return _plain(training, way) and bool(way.plan.streamed)


def _reuses_slots(training: Training, way: Way) -> bool:
    return _plain(training, way) and len(way.plan.streamed) > max(way.plan.num_slots, way.plan.num_early)


def _has_only_the_ring(training: Training, way: Way) -> bool:
    # For early buffers of the step before the program itself waits.
    return _has_stream(training, way) and way.plan.num_early <= way.plan.num_slots


def _has_early_slots(training: Training, way: Way) -> bool:
    return _has_stream(training, way) and way.overlaps and way.plan.num_early > way.plan.num_slots


def _sends_early(training: Training, way: Way) -> bool:
    # Of many some are told of in time.
    many = len(training.sizes) >= 4 and len(way.plan.cpu_order) >= 8
    return way.overlaps and way.plan.early_gradients and many


def _sends_early_and_updates(training: Training, way: Way) -> bool:
    # Work in a queue comes after all before it, so the first subgroups have to be told of: in some step they are.
    return _plain(training, way) and _sends_early(training, way) and len(training.steps) >= 3


def _sends_early_and_replans(training: Training, way: Way) -> bool:
    first = training.steps[0]
    dropped = first.dropped and all(first.given) and not first.looks
    return dropped and way.second_plan is not None and _sends_early(training, way)


DEFECTS = {
    "half_staged": Defect(
        "updated BF16 weights staged as FP16 and copied byte by byte",
        lambda training, way: _has_cpu(training, way) and set(training.dtypes) == {torch.bfloat16},
        _HalfStaged,
    ),
    "unawaited_update": Defect("weights go up before the CPU's update is over", _has_cpu, _UnawaitedUpdate),
    "flush_unordered": Defect("no event between the device's update and the flush", _has_stream, _FlushUnordered),
    "prefetch_unordered": Defect("no event between the prefetch and the update", _has_stream, _PrefetchUnordered),
    "last_unflushed": Defect("the last streamed subgroup is never flushed", _has_stream, _LastUnflushed),
    "unwritten_moments": Defect("moments begin as uninitialised memory", _has_cpu, prepare=_unwritten_moments),
    "prefetch_before_flush": Defect(
        "prefetch for the next step before the flush of this one", _has_only_the_ring, _Forgetful
    ),
    "slot_reused": Defect("a slot filled again before it was flushed", _reuses_slots, _SlotReused),
    "gradient_overwritten": Defect(
        "a host buffer of gradients overwritten while the CPU reads it", _reuses_gradient_buffers, _GradientOverwritten
    ),
    "forward_too_soon": Defect("the forward pass reads weights on their way up", _has_cpu, device=_ForwardTooSoon),
    "nothing_held": Defect("the model frees gradients that the update still reads", _plain, device=_NothingHeld),
    "released_too_soon": Defect("early buffers given back before they are flushed", _has_early_slots, _ReleasedTooSoon),
    "cpu_side_unmarked": Defect(
        "the CPU's weights go up while the backward pass reads the old ones", _sends_early_and_updates, _CpuSideUnmarked
    ),
    "buffers_unawaited": Defect(
        "replanning frees host buffers into which gradients still go", _sends_early_and_replans, _BuffersUnawaited
    ),
    "taken_too_soon": Defect("early buffers filled while the model uses their memory", _has_early_slots, _TakenTooSoon),
}
