"""A plan as operations on queues, and what each has to wait for. Torch-free.

The operations of a step are written down as a sequential program. Each names what it reads and writes, and from that
:class:`Order` computes the waits between queues; a queue by itself runs in order. Any execution that honours the waits
gives the results of the sequential program. The executor (streams and a CPU thread), the simulated devices of the tests
and the simulator of times all run this one list.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from pretrain.optim.offload.subgroups import Subgroup


class Place(StrEnum):
    """Where a subgroup is updated: by the CPU, on the device after its state was brought there, or on the device where
    its state stays."""

    CPU = "cpu"
    STREAM = "stream"
    RESIDENT = "resident"


class Queue(StrEnum):
    """In-order queues: streams of the device, and one of the host's CPU."""

    STATE_UP = "state up"
    STATE_DOWN = "state down"
    GRADIENT_DOWN = "gradient down"
    WEIGHT_UP = "weight up"
    DEVICE = "device update"
    CPU = "cpu update"


class Kind(StrEnum):
    PREFETCH = "prefetch"
    DEVICE_UPDATE = "device update"
    FLUSH = "flush"
    GRADIENT_DOWN = "gradient down"
    WEIGHT_DOWN = "weight down"
    CPU_UPDATE = "cpu update"
    WEIGHT_UP = "weight up"


QUEUE_OF = {
    Kind.PREFETCH: Queue.STATE_UP,
    Kind.DEVICE_UPDATE: Queue.DEVICE,
    Kind.FLUSH: Queue.STATE_DOWN,
    Kind.GRADIENT_DOWN: Queue.GRADIENT_DOWN,
    Kind.WEIGHT_DOWN: Queue.GRADIENT_DOWN,
    Kind.CPU_UPDATE: Queue.CPU,
    Kind.WEIGHT_UP: Queue.WEIGHT_UP,
}


class Resource(NamedTuple):
    """Memory that operations share: ``state`` (its home, host or resident), ``slot`` (device buffer for state),
    ``gradient`` and ``weight`` (the model's, by subgroup), ``host gradient`` and ``staged`` (host buffers)."""

    name: str
    number: int


@dataclass(frozen=True)
class Operation:
    """One operation of a step; ``buffer`` is the slot, or the host buffer of the weights, that it uses (-1: none),
    ``gradient_buffer`` the host buffer of the gradient."""

    kind: Kind
    subgroup: int
    buffer: int = -1
    gradient_buffer: int = -1
    reads: tuple[Resource, ...] = ()
    writes: tuple[Resource, ...] = ()

    @property
    def queue(self) -> Queue:
        return QUEUE_OF[self.kind]


@dataclass(frozen=True)
class Plan:
    """Where and in which order subgroups are updated.

    ``places``: by subgroup. ``device_order``, ``cpu_order``: subgroups as they are updated on the device (streamed and
    resident ones) and by the CPU. ``num_slots``: device buffers that streamed state cycles through (at least 3 where
    more than two subgroups are streamed). ``num_early``: streamed subgroups, the first of ``device_order``, that are
    prefetched during the last backward pass; those beyond ``num_slots`` get buffers of their own, which are used in
    turn with the others until the update is over.
    ``num_host_buffers``: host buffers of updated weights that CPU updates cycle through, and of gradients unless
    ``early_gradients``: then every CPU-updated subgroup has a gradient buffer of its own, which is filled during the
    last backward pass (:func:`gradient_operation`).
    """

    places: tuple[Place, ...]
    device_order: tuple[int, ...]
    cpu_order: tuple[int, ...]
    num_slots: int
    num_early: int = 0
    num_host_buffers: int = 3
    early_gradients: bool = False

    def without_early_buffers(self) -> Plan:
        """The same with slots of the ring alone."""
        return replace(self, num_early=min(self.num_early, self.num_slots))

    def with_resident(self, numbers: Collection[int]) -> Plan:
        """The same with these subgroups resident, before all others."""
        if all(self.places[number] is Place.RESIDENT for number in numbers):
            return self
        moved = frozenset(numbers)
        places = tuple(Place.RESIDENT if i in moved else place for i, place in enumerate(self.places))
        return replace(
            self,
            places=places,
            device_order=(*sorted(moved), *(i for i in self.device_order if i not in moved)),
            cpu_order=tuple(i for i in self.cpu_order if i not in moved),
            num_early=min(self.num_early, sum(place is Place.STREAM for place in places)),
        )

    @property
    def streamed(self) -> tuple[int, ...]:
        return tuple(i for i in self.device_order if self.places[i] is Place.STREAM)

    def slot(self, turn: int) -> int:
        """Device buffer of the ``turn``-th streamed subgroup; from ``num_slots`` on they are those of early ones."""
        # Buffers of early ones are used again: state of those that come later would else wait for the flushes of all
        # early ones, which are ahead of them in their queue.
        return turn % max(self.num_early, self.num_slots)


def early_operations(plan: Plan) -> Iterator[Operation]:
    """State that is brought to the device during the last backward pass, before the gradient norm is known."""
    for turn, subgroup in enumerate(plan.streamed[: plan.num_early]):
        yield _prefetch(subgroup, plan.slot(turn))


def gradient_operation(plan: Plan, subgroup: int) -> Operation:
    """A CPU-updated subgroup's gradient on its way to the host, once it is final, with ``plan.early_gradients``."""
    return _gradient_down(plan, plan.cpu_order.index(subgroup))


def update_operations(
    plan: Plan, subgroups: Sequence[Subgroup], *, host_weights: bool, weight_down: bool | Container[int]
) -> list[Operation]:
    """The update of every subgroup once, after :func:`early_operations`, as a sequential program.

    Args:
        host_weights: weights and gradients lie in host memory: CPU updates take them where they are.
        weight_down: see :class:`~pretrain.optim.offload.constants.Widths`; of all subgroups, or of which.
    """
    device = list(_device_operations(plan))
    cpu = list(_cpu_operations(plan, host_weights, weight_down))
    # Both sides in turn, by the share of elements done: what is issued first is what is wanted first.
    sizes = {subgroup.index: subgroup.numel for subgroup in subgroups}
    return _merged(device, cpu, sizes)


def _device_operations(plan: Plan) -> Iterator[list[Operation]]:
    turn = 0
    for subgroup in plan.device_order:
        gradient, weight, state = _named(subgroup)
        if plan.places[subgroup] is Place.RESIDENT:
            yield [Operation(Kind.DEVICE_UPDATE, subgroup, -1, -1, (gradient, state, weight), (state, weight))]
            continue
        buffer = plan.slot(turn)
        slot = Resource("slot", buffer)
        operations = [] if turn < plan.num_early else [_prefetch(subgroup, buffer)]
        operations.append(Operation(Kind.DEVICE_UPDATE, subgroup, buffer, -1, (gradient, slot, weight), (slot, weight)))
        operations.append(Operation(Kind.FLUSH, subgroup, buffer, -1, (slot,), (state,)))
        yield operations
        turn += 1


def _cpu_operations(plan: Plan, host_weights: bool, weight_down: bool | Container[int]) -> Iterator[list[Operation]]:
    for turn, subgroup in enumerate(plan.cpu_order):
        gradient, weight, state = _named(subgroup)
        if host_weights:
            yield [Operation(Kind.CPU_UPDATE, subgroup, -1, -1, (gradient, state, weight), (state, weight))]
            continue
        buffer = turn % plan.num_host_buffers
        staged = Resource("staged", buffer)
        down = _gradient_down(plan, turn)
        operations = [] if plan.early_gradients else [down]
        if weight_down if isinstance(weight_down, bool) else subgroup in weight_down:
            operations.append(Operation(Kind.WEIGHT_DOWN, subgroup, buffer, -1, (weight,), (staged,)))
        operations.append(
            Operation(
                Kind.CPU_UPDATE,
                subgroup,
                buffer,
                down.gradient_buffer,
                (*down.writes, state, staged),
                (state, staged),
            )
        )
        operations.append(Operation(Kind.WEIGHT_UP, subgroup, buffer, -1, (staged,), (weight,)))
        yield operations


def _gradient_down(plan: Plan, turn: int) -> Operation:
    subgroup = plan.cpu_order[turn]
    buffer = turn if plan.early_gradients else turn % plan.num_host_buffers
    gradient, host = Resource("gradient", subgroup), Resource("host gradient", buffer)
    return Operation(Kind.GRADIENT_DOWN, subgroup, -1, buffer, (gradient,), (host,))


def _prefetch(subgroup: int, buffer: int) -> Operation:
    return Operation(Kind.PREFETCH, subgroup, buffer, -1, (Resource("state", subgroup),), (Resource("slot", buffer),))


def _named(subgroup: int) -> tuple[Resource, Resource, Resource]:
    return Resource("gradient", subgroup), Resource("weight", subgroup), Resource("state", subgroup)


def _merged(first: list[list[Operation]], second: list[list[Operation]], sizes: dict[int, int]) -> list[Operation]:
    """Both lists in turn, so that each is through with the same share of its elements at every point."""
    keyed = []
    for number, side in enumerate((first, second)):
        total = sum(sizes[operations[0].subgroup] for operations in side)
        done = 0
        for operations in side:
            keyed.append((done / total, number, operations))
            done += sizes[operations[0].subgroup]
    return [operation for _, _, operations in sorted(keyed, key=lambda k: k[:2]) for operation in operations]


Handle = TypeVar("Handle")


class Order(Generic[Handle]):
    """Waits between queues: reads come after the last write, writes after the last write and all reads since.

    ``Handle`` is whatever stands for an issued operation (an event). Lives as long as the memory, over steps: state
    that still flows back holds up the prefetch of the next step into the same buffer.
    """

    def __init__(self) -> None:
        self._written: dict[Resource, tuple[Queue, Handle]] = {}
        # Of each queue the last read: queues run in order.
        self._read: dict[Resource, dict[Queue, Handle]] = {}

    def waits(self, operation: Operation) -> list[Handle]:
        """What ``operation`` waits for, of other queues than its own."""
        found: list[tuple[Queue, Handle]] = []
        for resource in operation.reads:
            if resource in self._written:
                found.append(self._written[resource])
        for resource in operation.writes:
            if resource in self._written:
                found.append(self._written[resource])
            found += self._read.get(resource, {}).items()
        handles: list[Handle] = []
        for queue, handle in found:
            if queue is not operation.queue and handle not in handles:
                handles.append(handle)
        return handles

    def issued(self, operation: Operation, handle: Handle) -> None:
        """Remember ``operation`` under ``handle``; call it in the order of the program."""
        for resource in operation.reads:
            self._read.setdefault(resource, {})[operation.queue] = handle
        for resource in operation.writes:
            self._written[resource] = (operation.queue, handle)
            self._read[resource] = {}

    def pending(self, name: str, number: int | None = None) -> list[Handle]:
        """Last operations on every resource called ``name``, or on that of them with this number."""
        if number is None:
            resources = [r for r in {**self._written, **self._read} if r.name == name]
        else:
            resources = [Resource(name, number)]
        handles = [self._written[resource][1] for resource in resources if resource in self._written]
        for resource in resources:
            handles += self._read.get(resource, {}).values()
        return handles
