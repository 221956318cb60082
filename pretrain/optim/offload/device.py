"""What the executor needs of a device: memory on two sides, in-order queues, events. And the host as such a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.cpu_adamw import cpu_adamw_
from pretrain.optim.offload.schedule import Operation


class Event(Protocol):
    """Stands for work given to a queue."""


class Device(Protocol):
    """Memory and queues. What the *model* does is on a queue of its own, which :meth:`mark` and :meth:`hold` meet.

    ``host_weights``: the model lies in host memory, where CPU updates take gradients and weights as they are.
    """

    host_weights: bool

    def empty_host(self, num_bytes: int) -> Tensor:
        """Host memory (pinned where that speeds up copies), uint8 ``[num_bytes]``, values undefined."""
        ...

    def empty_device(self, num_bytes: int) -> Tensor:
        """Device memory, uint8 ``[num_bytes]``, values undefined; in use by the model's queue until :meth:`mark`."""
        ...

    def free_device_bytes(self) -> int | None:
        """What :meth:`empty_device` may be asked for now besides; None: anything."""
        ...

    def release_device(self, memory: Tensor, event: Event) -> None:
        """``memory``, to which the caller keeps no reference, may be used for something else once ``event`` is over."""
        ...

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Event:
        """Give ``work`` to the operation's queue, to begin when ``waits`` are over; does not wait itself."""
        ...

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Within ``work``: copy between or on any side, converting where dtypes differ."""
        ...

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
        """Within ``work``: the update, by the device or by the CPU; see :mod:`pretrain.optim.offload.arithmetic`."""
        ...

    def mark(self) -> Event:
        """Everything that the model's queue has been given so far."""
        ...

    def hold(self, events: Iterable[Event]) -> None:
        """What the model's queue is given from now on begins when ``events`` are over."""
        ...

    def finish(self, events: Iterable[Event]) -> None:
        """Wait on the host until ``events`` are over.

        Raises:
            whatever went wrong in the work that they stand for.
        """
        ...


class OperationTime(NamedTuple):
    """When an operation ran, in seconds of the device's clock; ``start`` is when its waits were over, too."""

    operation: Operation
    start: float
    end: float


@runtime_checkable
class Clock(Protocol):
    """A device that tells when things happened: one clock for all queues, the model's and the host's CPU.

    Nothing here waits: what is not over yet is told later.
    """

    def measure(self, on: bool) -> None:
        """Note times of what is given from now on; off at first, when nothing is noted and nothing kept."""
        ...

    def collect(self) -> list[OperationTime]:
        """Operations that are over and were not told before, in the order in which they were given to :meth:`run`."""
        ...

    def time(self, event: Event) -> float | None:
        """When what ``event`` of :meth:`Device.mark` stands for was over; None while it is not."""
        ...


class InlineDevice:
    """The host, with nothing running beside: every operation is done when it is given, in the order of the program.

    Subgroups "on the device" are updated by the CPU too, through buffers, so that any plan works on any machine and
    gives the same numbers.
    """

    host_weights = True

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._measures = False
        self._times: list[OperationTime] = []

    def empty_host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def empty_device(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def free_device_bytes(self) -> int | None:
        return None

    def release_device(self, memory: Tensor, event: Event) -> None:
        pass

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Event:
        start = time.perf_counter()
        work()
        done = _Done()
        if self._measures:
            self._times.append(OperationTime(operation, start, done.time))
        return done

    def copy_(self, target: Tensor, source: Tensor) -> None:
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
        cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars, threads=self._threads)

    def mark(self) -> Event:
        return _Done()

    def hold(self, events: Iterable[Event]) -> None:
        pass

    def finish(self, events: Iterable[Event]) -> None:
        pass

    def measure(self, on: bool) -> None:
        self._measures, self._times = on, []

    def collect(self) -> list[OperationTime]:
        times, self._times = self._times, []
        return times

    def time(self, event: Event) -> float | None:
        assert isinstance(event, _Done), "an event of this device"
        return event.time


class _Done:
    """Of work that was done when it was given."""

    def __init__(self) -> None:
        self.time = time.perf_counter()
