"""The device under the executor on an NVIDIA GPU: a stream for every queue, events, a thread for the CPU's updates.

Memory that torch's caching allocator hands out belongs to the stream on which it was asked for, here the model's:
freed there, it is given to the model's next allocation at once, for that stream would use it later anyway. Other
streams that use it have to be ordered by hand:

* Gradients and weights are the model's. Whatever reads or writes them on a queue comes after a mark of the model's
  stream, and the executor holds the model's stream until it is done, before the caller can free a gradient: what the
  model's stream is given from then on, into the same memory too, comes later. ``record_stream`` would say the same
  again, at an event per free.
* Buffers from :meth:`CudaDevice.empty_device` may have been an activation a moment ago, of kernels that still run. The
  first use on a queue comes after a mark of the model's stream.
* An early buffer that is given back while its flush still runs would go to the next activation under way.
  ``record_stream`` on the flush's stream makes the allocator wait for that stream's events itself; the model's stream
  is not held up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.cpu_adamw import cpu_adamw_
from pretrain.optim.offload.device import Event, OperationTime
from pretrain.optim.offload.device_memory import free_device_bytes
from pretrain.optim.offload.gpu_adamw import gpu_adamw_
from pretrain.optim.offload.issuing import Issuer
from pretrain.optim.offload.pinned import registered_memory
from pretrain.optim.offload.schedule import Operation, Queue

logger = logging.getLogger(__name__)

_ANCHOR_SECONDS = 30.0
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


class CudaStreams:
    """:class:`~pretrain.optim.offload.issuing.Streams` of one GPU.

    Events know times relative to another event, in FP32 milliseconds; :meth:`anchor` ties such an event to the host's
    clock, often enough for their resolution.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[Queue, torch.cuda.Stream] = {
            queue: torch.cuda.Stream(device) for queue in Queue if queue is not Queue.CPU
        }
        self._clock = torch.cuda.Stream(device)
        self._anchor: tuple[torch.cuda.Event, float] | None = None

    def stream(self, queue: Queue | None) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if queue is None else self._streams[queue]

    def enter(self) -> None:
        # A new thread is at the process's first GPU: it would make a context there, of some hundred MiB.
        torch.cuda.set_device(self._device)

    def on(self, queue: Queue) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[queue])

    def record(self, queue: Queue | None, *, timed: bool) -> _Point:
        # Blocking: the thread that waits for it sleeps, and leaves its core to the CPU's update.
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(self.stream(queue))
        return _Point(event, self._anchor if timed else None)

    def wait(self, queue: Queue | None, point: _Point) -> None:
        self.stream(queue).wait_event(point.event)

    def synchronize(self, point: _Point) -> None:
        point.event.synchronize()

    def is_over(self, point: _Point) -> bool:
        return point.event.query()

    def seconds(self, point: _Point) -> float:
        assert point.anchor is not None, "a timed point"
        event, at = point.anchor
        return at + event.elapsed_time(point.event) / 1e3

    def anchor(self) -> None:
        """Look at both clocks. Waits for an event on a stream that does nothing else, some microseconds."""
        if self._anchor is not None and time.perf_counter() - self._anchor[1] < _ANCHOR_SECONDS:
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._clock)
        event.synchronize()
        self._anchor = event, time.perf_counter()


class _Point:
    def __init__(self, event: torch.cuda.Event, anchor: tuple[torch.cuda.Event, float] | None) -> None:
        self.event = event
        self.anchor = anchor


class CudaDevice:
    """A :class:`~pretrain.optim.offload.device.Device` and :class:`~pretrain.optim.offload.device.Clock`.

    Args:
        device: the model's.
        threads: of the CPU's update (None: torch's number).

    After work failed, :meth:`run` raises ``RuntimeError``, and :meth:`hold` and :meth:`finish` raise what failed.
    """

    host_weights = False

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._threads = threads
        self._streams = CudaStreams(self._device)
        self._issuer = Issuer(self._streams)
        self._registers = True

    def empty_host(self, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._registers:
            memory = registered_memory(num_bytes, self._register, _unregister)
            if memory is not None:
                return memory
            self._registers = False
            logger.warning(
                "host memory could not be registered with the GPU's driver; torch's pinned allocator is used, which "
                "rounds each buffer up to a power of two"
            )
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def empty_device(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def free_device_bytes(self) -> int | None:
        return free_device_bytes(self._device)

    def release_device(self, memory: Tensor, event: Event) -> None:
        queue = getattr(event, "queue", None)
        if queue is None:
            return  # the model's own stream: its memory is given on in that stream's order
        if queue is Queue.CPU:
            self._issuer.after(event, lambda: _drop(memory))
            return
        stream = self._streams.stream(queue)
        # In the queue's turn: on a thread that still waits, the stream was not given the last use yet.
        self._issuer.after(event, lambda: memory.record_stream(stream))

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Event:
        return self._issuer.run(operation, waits, work)

    def copy_(self, target: Tensor, source: Tensor) -> None:
        # Between sides torch converts on the host: at once, when the stream is perhaps not there yet, and through
        # memory that is not pinned. So values are converted on the device.
        if source.dtype != target.dtype and source.device != target.device:
            source = source.to(target.dtype) if source.is_cuda else source.to(self._device, non_blocking=True)
        target.copy_(source, non_blocking=True)

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
        if on_device:
            gpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars)
        else:
            cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars, threads=self._threads)

    def mark(self) -> Event:
        return self._issuer.mark()

    def hold(self, events: Iterable[Event]) -> None:
        self._issuer.hold(events)

    def finish(self, events: Iterable[Event]) -> None:
        self._issuer.finish(events)

    def measure(self, on: bool) -> None:
        if on:
            self._streams.anchor()
        self._issuer.measure(on)

    def collect(self) -> list[OperationTime]:
        times = self._issuer.collect()
        self._streams.anchor()
        return times

    def time(self, event: Event) -> float | None:
        return self._issuer.time(event)

    def _register(self, address: int, num_bytes: int) -> bool:
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE)) == 0:
                return True
            # The failure stays behind as the thread's last error, of which the next kernel would be accused.
            with suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            return False


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _drop(memory: Tensor) -> None:
    """Kept until here."""
