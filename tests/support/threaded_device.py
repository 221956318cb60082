"""Streams that are threads, and a device of them: real concurrency under the logic that issues work to a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.cpu_adamw import cpu_adamw_
from pretrain.optim.offload.device import Event
from pretrain.optim.offload.issuing import Handle, Issuer
from pretrain.optim.offload.schedule import Queue


class Point:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.at = 0.0

    def reach(self) -> None:
        self.at = time.perf_counter()
        self.reached.set()


class ThreadStreams:
    """A thread for every stream, which does what it is given in its order; waits are done by that thread."""

    def __init__(self) -> None:
        self._work: dict[Queue | None, SimpleQueue[Callable[[], object] | None]] = {}
        self._threads = []
        self._local = threading.local()
        for queue in (None, *(queue for queue in Queue if queue is not Queue.CPU)):
            self._work[queue] = SimpleQueue()
            self._threads.append(threading.Thread(target=self._serve, args=(queue,), daemon=True))
            self._threads[-1].start()

    def _serve(self, queue: Queue | None) -> None:
        while (work := self._work[queue].get()) is not None:
            work()

    def submit(self, work: Callable[[], object]) -> None:
        """To the calling thread's current stream."""
        self._work[getattr(self._local, "queue", None)].put(work)

    def enter(self) -> None:
        """Threads of the issuer need nothing here."""

    @contextmanager
    def on(self, queue: Queue) -> Iterator[None]:
        self._local.queue = queue
        yield
        self._local.queue = None

    def record(self, queue: Queue | None, *, timed: bool) -> Point:
        point = Point()
        self._work[queue].put(point.reach)
        return point

    def wait(self, queue: Queue | None, point: Point) -> None:
        self._work[queue].put(point.reached.wait)

    def synchronize(self, point: Point) -> None:
        point.reached.wait()

    def is_over(self, point: Point) -> bool:
        return point.reached.is_set()

    def seconds(self, point: Point) -> float:
        return point.at

    def close(self) -> None:
        for work in self._work.values():
            work.put(None)
        for thread in self._threads:
            thread.join()


class ThreadDevice:
    """A :class:`~pretrain.optim.offload.trials.ModelDevice` over threads, as ``CudaDevice`` is over CUDA."""

    host_weights = False

    def __init__(self) -> None:
        self.streams = ThreadStreams()
        self.issuer = Issuer(self.streams)
        self.run = self.issuer.run
        self.mark = self.issuer.mark
        self.hold = self.issuer.hold
        self.finish = self.issuer.finish

    def __enter__(self) -> ThreadDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()
            self.streams.close()

    def empty_host(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    empty_device = empty_host

    def free_device_bytes(self) -> int | None:
        return None

    def release_device(self, memory: Tensor, event: Event) -> None:
        # Whoever gets it next writes to it at once.
        assert isinstance(event, Handle)
        queue = event.queue
        assert queue is not None
        assert queue is not Queue.CPU

        def give_on() -> None:
            with self.streams.on(queue):
                self.streams.submit(lambda: memory.fill_(255))

        self.issuer.after(event, give_on)

    def copy_(self, target: Tensor, source: Tensor) -> None:
        self.streams.submit(lambda: target.copy_(source))

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
        def work() -> None:
            cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, scalars, threads=1)

        if on_device:
            self.streams.submit(work)
        else:
            work()

    def model_tensor(self, values: Tensor, label: str = "") -> Tensor:
        return values.clone()

    def model_writes(self, tensor: Tensor, values: Tensor) -> None:
        copied = values.clone()
        self.streams.submit(lambda: tensor.copy_(copied))

    def model_reads(self, tensor: Tensor, then: Callable[[Tensor], None] | None = None) -> None:
        def read() -> None:
            if then is not None:
                then(tensor.clone())

        self.streams.submit(read)

    def model_frees(self, tensor: Tensor) -> None:
        self.streams.submit(lambda: tensor.view(torch.uint8).fill_(255))

    def settle(self) -> None:
        self.finish([self.mark()])
