"""A device made of host memory, for proofs: queues run in random legal orders, and every byte touched is checked.

:class:`SimulatedDevice` takes the place of a GPU under the executor. What it is given is not done at once: a seeded
scheduler picks, whenever it likes or must, any operation that may begin. Each access of each operation, of the model
and of the program itself is checked against all others (:mod:`~pretrain.optim.offload.shadow`), so a missing wait is
found in whatever order things happened to run.

Modelled are in-order streams, a CPU thread, and a caching allocator that gives memory on as soon as it may: what was
released is overwritten at once by its next user, and what is handed out was somebody's until a moment ago. Host memory
is gone as soon as nothing refers to it.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.cpu_adamw import cpu_adamw_
from pretrain.optim.offload.device import Event
from pretrain.optim.offload.pinned import weak_buffer
from pretrain.optim.offload.schedule import Operation, Queue
from pretrain.optim.offload.shadow import Actor, Clock, Found, RaceError, Region, Regions, Side, join
from pretrain.optim.offload.simulated_queues import MODEL, PROGRAM, Queues, as_task
from pretrain.optim.offload.watch import Watch

_RELEASE = "release"
_POISON = 0xFF
"""NaN as FP32, BF16 and FP16."""


class _Block:
    """Device or host memory of one allocation; it stays, so that no address is ever used twice."""

    def __init__(self, num_bytes: int, side: Side, label: str) -> None:
        self.memory = bytearray(num_bytes)
        self.side = side
        self.bytes = (ctypes.c_uint8 * num_bytes).from_buffer(self.memory)
        self.region = Region(ctypes.addressof(self.bytes), num_bytes, side, label)
        self.freed = False
        self.tenants = 0

    def tensor(self, on_free: Callable[[tuple[_Block, int]], None]) -> Tensor:
        """uint8; ``on_free`` is called when the last view of it is gone."""
        exporter = weak_buffer(self.memory)
        self.tenants += 1
        weakref.finalize(exporter, on_free, (self, self.tenants)).atexit = False
        return torch.frombuffer(exporter, dtype=torch.uint8)

    def poison(self) -> None:
        ctypes.memset(self.bytes, _POISON, len(self.memory))


class SimulatedDevice:
    """A :class:`~pretrain.optim.offload.device.Device`; use it as a context, within which the program is watched.

    Args:
        seed: of the order in which things run.
        device_bytes: memory of the device, the model's tensors included; None: unlimited.

    Every method, and leaving the context, raises :class:`~pretrain.optim.offload.shadow.RaceError` when what runs
    meanwhile is at fault.
    """

    host_weights = False

    def __init__(self, seed: int, *, device_bytes: int | None = None) -> None:
        self._random = random.Random(seed)
        self._limit = device_bytes
        self._regions = Regions()
        self._idle: list[_Block] = []
        self._dropped: list[tuple[_Block, int]] = []
        self._dropped_on_host: list[tuple[_Block, Clock]] = []
        self._kept: list[_Block] = []
        self._releases = 0
        self._watch = Watch(_weakly(self.direct))
        self._queues = Queues(self._random, self._watch.again)
        self.used_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> SimulatedDevice:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._watch.__exit__(kind, error, traceback)

    @property
    def trace(self) -> list[str]:
        """Names of what ran, in that order."""
        return self._queues.trace

    # The protocol of Device.

    def empty_host(self, num_bytes: int) -> Tensor:
        self._advance()
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        dropped, clock = self._dropped_on_host, self._queues.clocks[PROGRAM]
        # What the program knows to be over at that moment counts: whoever gets the memory next waits for nothing.
        return self._new_block(num_bytes, Side.HOST, "host memory").tensor(
            lambda block: dropped.append((block[0], dict(clock)))
        )

    def empty_device(self, num_bytes: int) -> Tensor:
        self._advance()
        return self._empty_device(num_bytes, "device memory")

    def free_device_bytes(self) -> int | None:
        """Drawn: the model sets memory free in its own time."""
        return self._random.choice((None, 0, 64))

    def release_device(self, memory: Tensor, event: Event) -> None:
        self._advance()
        if not memory.numel():
            return
        block = self._block(memory)
        if block.freed:
            raise RaceError(Found.SIDE, f"{block.region.label} is released twice")
        block.freed = True
        # On a queue of its own: it waits for the event and for nothing else.
        self._releases += 1
        queue = f"{_RELEASE} {self._releases}"
        self._queues.add(queue)
        self._queues.give(f"next user of {block.region.label}", queue, [event], self._retire(block), {})

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Event:
        self._queues.check_usable()
        self._advance()
        return self._queues.give(f"{operation.kind} of {operation.subgroup}", operation.queue, waits, work)

    def copy_(self, target: Tensor, source: Tensor) -> None:
        actor = self._current("copy_")
        if not target.numel():
            return
        from_region, to_region = self._region(source), self._region(target)
        if actor.queue == Queue.CPU and Side.DEVICE in (from_region.side, to_region.side):
            raise RaceError(
                Found.SIDE, f"{actor} copies {from_region.label} to {to_region.label}: the CPU sees neither"
            )
        if actor.queue != Queue.CPU and from_region.side == to_region.side == Side.HOST:
            raise RaceError(Found.SIDE, f"{actor} copies within host memory: a stream would not do it in its turn")
        self._touch(actor, source, write=False)
        self._touch(actor, target, write=True)
        with self._watch.off():
            target.copy_(source)

    def adamw_(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        gradient: Tensor,
        weight: Tensor | None,
        scalars: StepScalars,
        *,
        on_device: bool,
    ) -> None:
        actor = self._current("adamw_")
        side = Side.DEVICE if on_device else Side.HOST
        if (actor.queue != Queue.CPU) is not on_device:
            raise RaceError(Found.SIDE, f"{actor} updates on the {side}")
        given = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "gradient": gradient}
        for name, tensor in {**given, **({} if weight is None else {"weight": weight})}.items():
            if tensor.numel() and self._region(tensor).side is not side:
                raise RaceError(
                    Found.SIDE, f"{actor} updates on the {side}, but {name} is {self._region(tensor).label}"
                )
        for tensor in given.values():
            self._touch(actor, tensor, write=False)
        if weight is not None and master.dtype == torch.int16:
            self._touch(actor, weight, write=False)
        for changed in (master, exp_avg, exp_avg_sq, weight):
            if changed is not None:
                self._touch(actor, changed, write=True)
        with self._watch.off():
            cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars)

    def mark(self) -> Event:
        self._advance()
        return self._queues.give("mark", MODEL, [], None)

    def hold(self, events: Iterable[Event]) -> None:
        events = list(events)
        if self._queues.error is not None:
            raise self._queues.error
        self._advance()
        self._queues.give("hold", MODEL, events, None)

    def finish(self, events: Iterable[Event]) -> None:
        self._advance()
        tasks = [as_task(event) for event in events]
        for task in tasks:
            self._queues.reach(task)
            self._queues.learn(task)
        for task in tasks:
            if task.error is not None:
                raise task.error

    # The model, as a test plays it.

    def model_tensor(self, values: Tensor, label: str = "the model's memory") -> Tensor:
        """Device memory that the model's queue fills with ``values``; freed, in the order of that queue, when the last
        view of it is gone."""
        raw = self._empty_device(values.nbytes, label)
        tensor = raw.view(values.dtype).view(values.shape)
        self.model_writes(tensor, values)
        return tensor

    def model_writes(self, tensor: Tensor, values: Tensor) -> None:
        """The model's queue writes ``values`` of now."""
        with self._watch.off():
            values = values.clone()
        self._advance()
        self._queues.give("the model's write", MODEL, [], lambda: self.copy_in(tensor, values))

    def model_reads(self, tensor: Tensor, then: Callable[[Tensor], None] | None = None) -> None:
        """The model's queue reads; ``then`` gets a copy of what it finds."""

        def work() -> None:
            self._touch(self._current("read"), tensor, write=False)
            with self._watch.off():
                if then is not None:
                    then(tensor.clone())

        self._advance()
        self._queues.give("the model's read", MODEL, [], work)

    def limit_bytes(self, device_bytes: int) -> None:
        """The device has this much memory from now on."""
        self._limit = device_bytes

    def model_frees(self, tensor: Tensor) -> None:
        """The model's memory is used for something else by its queue from now on."""
        block = self._block(tensor)
        self._advance()
        self._free(block)

    def settle(self) -> None:
        """Do everything, and wait for it."""
        self._check_dropped()
        self._queues.settle()
        self._check_dropped()

    def copy_in(self, tensor: Tensor, values: Tensor) -> None:
        """Within work on the model's queue: write values that are nobody's memory."""
        self._touch(self._current("write"), tensor, write=True)
        with self._watch.off():
            tensor.copy_(values)

    # Memory.

    def _check_dropped(self) -> None:
        """Host memory goes back to the system at once: all that ever touched it must be known to be over."""
        while self._dropped_on_host:
            block, clock = self._dropped_on_host.pop()
            block.region.write(Actor("the release of unused memory", PROGRAM, clock), 0, len(block.memory), empty=True)

    def _advance(self) -> None:
        self._check_dropped()
        self._queues.advance()
        while self._dropped:
            block, tenant = self._dropped.pop()
            # Released memory has perhaps been handed out again before its last view went.
            if tenant == block.tenants:
                self._free(block)

    def _new_block(self, num_bytes: int, side: Side, label: str) -> _Block:
        block = _Block(num_bytes, side, f"{label} {len(self._kept)} ({num_bytes} bytes)")
        block.poison()
        self._kept.append(block)
        self._regions.add(block.region)
        return block

    def _empty_device(self, num_bytes: int, label: str) -> Tensor:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        # What was released and may be given on is free: the allocator looks when it is asked.
        while self._retire_next(certainly=self._limit is not None):
            pass
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        if self._limit is not None and self.used_bytes > self._limit:
            raise RaceError(Found.LIMIT, f"{self.used_bytes} bytes in use, the device has {self._limit}")
        block = next((b for b in self._idle if len(b.memory) == num_bytes), None)
        if block is None:
            block = self._new_block(num_bytes, Side.DEVICE, label)
        else:
            self._idle.remove(block)
            # The allocator knows that its last user is done. That is chance, no rule to order anything else by.
            block.region.forget()
            block.freed = False
        # Whoever had it before, on the model's queue, is perhaps not done with it.
        self._queues.give(f"last user of {block.region.label}", MODEL, [], self._scribble(block))
        return block.tensor(self._dropped.append)

    def _retire_next(self, *, certainly: bool) -> bool:
        ready = [task for task in self._queues.runnable() if task.queue.startswith(_RELEASE)]
        if not ready or not (certainly or self._random.random() < 0.5):
            return False
        self._queues.pick(ready)
        return True

    def _scribble(self, block: _Block) -> Callable[[], None]:
        def work() -> None:
            block.region.write(self._current("scribble"), 0, len(block.memory), empty=True)
            block.poison()

        return work

    def _retire(self, block: _Block) -> Callable[[], None]:
        scribble = self._scribble(block)

        def work() -> None:
            scribble()
            self.used_bytes -= len(block.memory)
            self._idle.append(block)

        return work

    def _free(self, block: _Block) -> None:
        """In the order of the model's queue, as its next allocation in that memory is."""
        if not block.freed:
            block.freed = True
            self.used_bytes -= len(block.memory)
            self._queues.give(f"next user of {block.region.label}", MODEL, [], self._scribble(block))

    def _block(self, tensor: Tensor) -> _Block:
        region = self._region(tensor)
        return next(block for block in self._kept if block.region is region)

    def _region(self, tensor: Tensor) -> Region:
        region = self._regions.find(tensor.data_ptr())
        if region is None:
            raise RaceError(
                Found.SIDE, f"memory of shape {tuple(tensor.shape)} is not of this device or its host memory"
            )
        return region

    def _current(self, what: str) -> Actor:
        if self._queues.running is None:
            raise RaceError(Found.SIDE, f"{what} outside of work")
        return self._queues.running

    def _touch(self, actor: Actor, tensor: Tensor, *, write: bool) -> None:
        if not tensor.numel():
            return
        if not tensor.is_contiguous():
            raise RaceError(
                Found.SIDE, f"{actor} takes a tensor with strides {tensor.stride()}, expected a contiguous one"
            )
        region = self._region(tensor)
        start = tensor.data_ptr() - region.address
        (region.write if write else region.read)(actor, start, start + tensor.nbytes)

    def direct(self, touched: Sequence[tuple[Tensor, bool]], name: str) -> None:
        """The program, or the work of an operation, touches memory with torch itself."""
        regions = [(tensor, write, region) for tensor, write in touched if (region := self._found(tensor)) is not None]
        if not regions:
            return
        sides = {region.side for _, _, region in regions}
        if (actor := self._queues.running) is not None:
            if sides != {Side.HOST if actor.queue == Queue.CPU else Side.DEVICE}:
                raise RaceError(Found.SIDE, f"{name} within {actor} touches {' and '.join(sorted(sides))} memory")
        else:
            if Side.DEVICE in sides:
                # It goes to the model's queue; with host memory besides it also waits for it.
                self._queues.reach(self._queues.give(name, MODEL, [], None))
                join(self._queues.clocks[MODEL], self._queues.clocks[PROGRAM])
            queue = MODEL if Side.DEVICE in sides else PROGRAM
            self._queues.clocks[queue][queue] += 1
            actor = Actor(f"direct {name}", queue, dict(self._queues.clocks[queue]))
            if queue == MODEL and Side.HOST in sides:
                join(self._queues.clocks[PROGRAM], self._queues.clocks[MODEL])
        for tensor, write, region in regions:
            start = tensor.data_ptr() - region.address
            stop = start + tensor.nbytes
            if not tensor.is_contiguous():
                stop = start + tensor.element_size() * (
                    1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                )
            (region.write if write else region.read)(actor, start, stop)

    def _found(self, tensor: Tensor) -> Region | None:
        return self._regions.find(tensor.data_ptr()) if tensor.numel() else None


def _weakly(method: Callable[[Sequence[tuple[Tensor, bool]], str], None]) -> Callable[..., None]:
    """``method``, without keeping its object, and all memory with it, until the collector comes by."""
    reference = weakref.WeakMethod(method)

    def call(touched: Sequence[tuple[Tensor, bool]], name: str) -> None:
        if (found := reference()) is not None:
            found(touched, name)

    return call
