"""Runs a plan: gives each operation of a step to its queue, with the waits that the schedule computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.device import Device, Event
from pretrain.optim.offload.memory import Memory, State, Storage
from pretrain.optim.offload.schedule import (
    Kind,
    Operation,
    Order,
    Place,
    Plan,
    early_operations,
    gradient_operation,
    update_operations,
)
from pretrain.optim.offload.subgroups import Segment

logger = logging.getLogger(__name__)


class Executor:
    """Drives ``device`` through steps.

    A step is :meth:`start_early` and :meth:`send_gradient` (both optional), then :meth:`update` or :meth:`discard`.
    Nothing here waits on the host, except that :meth:`update` returns when the CPU is through with its share, and
    :meth:`start_early` when the early buffers of the step before are free (long ago, unless steps are very short).

    Args:
        weights: flat weights by target, written in place.
    """

    def __init__(self, device: Device, memory: Memory, plan: Plan, weights: Sequence[Tensor]) -> None:
        self._device = device
        self._memory = memory
        self._weights = weights
        self._order: Order[Event] = Order()
        self._subgroups = memory.shape.subgroups
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        """Go on by another plan, of which ``memory`` knows; nothing may be under way."""
        self._order = Order()
        self._early: dict[int, Event] = {}
        self._to_come: list[Operation] = []
        self._sent: dict[int, Event] = {}
        self._released: list[Event] = []
        self._is_full = False
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        partly = {i for i, storage in enumerate(self._memory.shape.storages) if storage is not Storage.FULL}
        self._operations = update_operations(
            plan, self._subgroups, host_weights=self._device.host_weights, weight_down=partly
        )
        self._last_flush = {o.buffer: o for o in self._operations if o.kind is Kind.FLUSH}

    @property
    def plan(self) -> Plan:
        """The plan that is followed: that of :meth:`set_plan`, or one with less early state."""
        return self._plan

    def start_early(self) -> None:
        """Bring state to the device while the last backward pass goes on: what has buffers, and of the rest what there
        is memory for now."""
        if self._early or self._to_come or not self._memory.is_complete:
            return
        self._to_come = list(early_operations(self._plan))
        self.advance_early()

    def advance_early(self, *, certainly: bool = False) -> None:
        """Bring more of it, as the backward pass sets memory free; ``certainly``: all, that pass is over. What there is
        no memory for even then comes in its turn, in this and all later steps."""
        while self._to_come:
            operation = self._to_come[0]
            if missing := self._memory.missing_bytes(operation.buffer):
                if not certainly and not self._has_room(missing):
                    return
                # Taken anew before those of the last step are given back, they would be there twice.
                self._device.finish(self._released)
                self._released = []
                try:
                    self._memory.add_early_slot(operation.buffer)
                except torch.OutOfMemoryError:
                    # The model had more need of it. Asking again makes the allocator wait for the device.
                    self._is_full = True
                    if certainly:
                        self._give_up_early_buffers()
                    return
            # The buffer may have been the model's a moment ago.
            marker = self._device.mark()
            self._early[operation.buffer] = self._issue(operation, marker, self._prefetch(operation))
            del self._to_come[0]

    def _has_room(self, num_bytes: int) -> bool:
        free = self._device.free_device_bytes()
        return not self._is_full and (free is None or free >= num_bytes)

    def _give_up_early_buffers(self) -> None:
        """Go on with the ring of slots alone. What was brought beyond it is not used: its home has the same values."""
        ring = self._plan.num_slots
        for slot in [slot for slot in self._early if slot >= ring]:
            self._release(slot, self._early.pop(slot))
        self._to_come = []
        self._memory.forget_early_slots()
        logger.warning(
            "offloaded optimizer state: no device memory for %d buffers of early state; from now on %d of %d streamed "
            "subgroups come before the update",
            self._plan.num_early - ring,
            ring,
            len(self._plan.streamed),
        )
        self._follow(self._plan.without_early_buffers())

    def sends_early(self, subgroup: int) -> bool:
        """Whether this gradient goes to the host as soon as it is final."""
        if self._device.host_weights or not self._plan.early_gradients or not self._memory.is_complete:
            return False
        return self._plan.places[subgroup] is Place.CPU and subgroup not in self._sent

    def send_gradient(self, subgroup: int, gradients: Sequence[Tensor | None]) -> None:
        """Take a CPU-updated subgroup's gradient to the host; ``gradients`` by target, final."""
        operation = gradient_operation(self._plan, subgroup)
        self._sent[subgroup] = self._issue(operation, self._device.mark(), self._gradient_down(operation, gradients))

    def update(self, gradients: Sequence[Tensor | None], scalars: Sequence[StepScalars]) -> None:
        """Update every subgroup. ``gradients``: flat, by target, None for a target that is left alone; ``scalars``: by
        subgroup."""
        if self._plan.early_gradients:
            for subgroup in self._plan.cpu_order:
                if self.sends_early(subgroup):
                    self.send_gradient(subgroup, gradients)
        self.start_early()
        self.advance_early(certainly=True)
        marker = self._device.mark()
        of_model: list[Event] = list(self._sent.values())
        for operation in self._operations:
            event = self._issue(operation, marker, self._work(operation, gradients, scalars[operation.subgroup]))
            if operation.kind is Kind.FLUSH:
                if operation is self._last_flush[operation.buffer]:
                    self._release(operation.buffer, event)
            elif operation.kind is not Kind.PREFETCH:
                of_model.append(event)
        # The model's next operations read the weights and reuse the memory of gradients.
        self._device.hold(of_model)
        self._early, self._sent, self._is_full = {}, {}, False

    def discard(self) -> None:
        """Forget what was brought early: its home has the same values. Gradients that were sent are overwritten."""
        for slot, event in self._early.items():
            self._release(slot, event)
        self._device.hold(self._sent.values())
        self._early, self._to_come, self._sent, self._is_full = {}, [], {}, False

    def synchronize(self) -> None:
        """Wait until all state is at home and nothing is under way."""
        for name in ("state", "slot", "weight", "gradient", "host gradient", "staged"):
            self._device.finish(self._order.pending(name))

    def finish(self, subgroups: Iterable[int]) -> None:
        """Wait until the state of these is at home and their weights are written."""
        for subgroup in subgroups:
            for name in ("state", "weight"):
                self._device.finish(self._order.pending(name, subgroup))

    def _issue(self, operation: Operation, marker: Event, work: Callable[[], None]) -> Event:
        event = self._device.run(operation, [*self._order.waits(operation), marker], work)
        self._order.issued(operation, event)
        return event

    def _release(self, slot: int, event: Event) -> None:
        if (block := self._memory.take_early_slot(slot)) is not None:
            self._device.release_device(block, event)
            self._released.append(event)

    def _work(
        self, operation: Operation, gradients: Sequence[Tensor | None], scalars: StepScalars
    ) -> Callable[[], None]:
        match operation.kind:
            case Kind.PREFETCH:
                return self._prefetch(operation)
            case Kind.FLUSH:
                return self._flush(operation)
            case Kind.DEVICE_UPDATE:
                return self._direct_update(operation, gradients, scalars, on_device=True)
            case Kind.GRADIENT_DOWN:
                return self._gradient_down(operation, gradients)
            case Kind.WEIGHT_DOWN | Kind.WEIGHT_UP:
                return self._weight_copy(operation, gradients)
            case Kind.CPU_UPDATE if self._device.host_weights:
                return self._direct_update(operation, gradients, scalars, on_device=False)
            case Kind.CPU_UPDATE:
                return self._staged_update(operation, gradients, scalars)

    def _prefetch(self, operation: Operation) -> Callable[[], None]:
        home, slot = self._memory.home(operation.subgroup), self._memory.slot(operation.buffer)
        return lambda: self._device.copy_(slot[: home.numel()], home)

    def _flush(self, operation: Operation) -> Callable[[], None]:
        home, slot = self._memory.home(operation.subgroup), self._memory.slot(operation.buffer)
        return lambda: self._device.copy_(home, slot[: home.numel()])

    def _direct_update(
        self, operation: Operation, gradients: Sequence[Tensor | None], scalars: StepScalars, *, on_device: bool
    ) -> Callable[[], None]:
        """Update with the model's own gradients and weights, target by target."""
        number = operation.subgroup
        block = self._memory.home(number) if operation.buffer < 0 else self._memory.slot(operation.buffer)
        state = self._memory.state(block, number)
        segments = self._subgroups[number].segments
        # The tensors of now: the caller's list may change.
        given = [(s, g[s.start : s.stop]) for s in segments if (g := gradients[s.target]) is not None]

        def work() -> None:
            for segment, gradient in given:
                weight = self._weights[segment.target][segment.start : segment.stop]
                part = state.part(segment.offset, segment.offset + segment.numel)
                self._update(part, gradient, weight, scalars, on_device=on_device)

        return work

    def _staged_update(
        self, operation: Operation, gradients: Sequence[Tensor | None], scalars: StepScalars
    ) -> Callable[[], None]:
        """Update with copies of gradients and weights on the host, all of the subgroup at once where it can be."""
        number = operation.subgroup
        numel = self._subgroups[number].numel
        state = self._memory.home_state(number)
        host = self._memory.host_gradient(operation.gradient_buffer, numel)
        staged = self._staged(operation)
        spans = _spans([s for s in self._subgroups[number].segments if gradients[s.target] is not None])

        def work() -> None:
            for start, stop in spans:
                part = state.part(start, stop)
                self._update(part, host[start:stop], staged[start:stop], scalars, on_device=False)

        return work

    def _update(self, state: State, gradient: Tensor, weight: Tensor, scalars: StepScalars, *, on_device: bool) -> None:
        master, out = (weight, None) if state.master is None else (state.master, weight)
        self._device.adamw_(master, state.exp_avg, state.exp_avg_sq, gradient, out, scalars, on_device=on_device)

    def _gradient_down(self, operation: Operation, gradients: Sequence[Tensor | None]) -> Callable[[], None]:
        subgroup = self._subgroups[operation.subgroup]
        host = self._memory.host_gradient(operation.gradient_buffer, subgroup.numel)
        # The tensors of now: the caller's list may change.
        given = [(s, g[s.start : s.stop]) for s in subgroup.segments if (g := gradients[s.target]) is not None]

        def work() -> None:
            for segment, gradient in given:
                self._device.copy_(host[segment.offset : segment.offset + segment.numel], gradient)

        return work

    def _weight_copy(self, operation: Operation, gradients: Sequence[Tensor | None]) -> Callable[[], None]:
        staged = self._staged(operation)
        # What is not updated was not staged.
        segments = [s for s in self._subgroups[operation.subgroup].segments if gradients[s.target] is not None]

        def work() -> None:
            for segment in segments:
                there = self._weights[segment.target][segment.start : segment.stop]
                here = staged[segment.offset : segment.offset + segment.numel]
                target, source = (here, there) if operation.kind is Kind.WEIGHT_DOWN else (there, here)
                self._device.copy_(target, source)

        return work

    def _staged(self, operation: Operation) -> Tensor:
        subgroup = self._subgroups[operation.subgroup]
        dtype: torch.dtype = self._weights[subgroup.segments[0].target].dtype
        return self._memory.staged(operation.buffer, subgroup.numel, dtype)


def _spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Ranges of a subgroup that ``segments`` fill, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for segment in segments:
        stop = segment.offset + segment.numel
        if spans and spans[-1][1] == segment.offset:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((segment.offset, stop))
    return spans
