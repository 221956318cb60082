"""Gives work to streams so that nobody waits who need not: queues, host threads and failures, without a word of CUDA.

Work on a stream can be given to it at once when all it waits for was given to its own stream already: the caller does
that itself. Work that waits for the CPU cannot: a stream does not know when a host thread is done. It goes to a host
thread of its queue, as does everything after it in that queue, which gives it when the time has come. The CPU's queue
is one thread, which waits for streams and then works; the Python lock is free meanwhile.

A CUDA event that is waited for before it was recorded counts as over. Here that cannot happen: a :class:`Handle` has no
event before the work it stands for was given, and whoever wants to wait for it waits for that first.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Protocol

from pretrain.optim.offload.device import Event, OperationTime
from pretrain.optim.offload.schedule import Operation, Queue

Recorded = Any
"""A point in a stream, as :class:`Streams` makes and takes it."""


class Streams(Protocol):
    """A stream for every queue but the CPU's, and the model's, which is the calling thread's current one (None)."""

    def enter(self) -> None:
        """Called once by every thread that gives work to streams, before the first."""
        ...

    def on(self, queue: Queue) -> AbstractContextManager[Any]:
        """Within, device operations of this thread go to the queue's stream."""
        ...

    def record(self, queue: Queue | None, *, timed: bool) -> Recorded:
        """The point in the stream after all that it was given so far."""
        ...

    def wait(self, queue: Queue | None, point: Recorded) -> None:
        """What the stream is given from now on begins after ``point``."""
        ...

    def synchronize(self, point: Recorded) -> None:
        """The calling thread waits until ``point`` is reached."""
        ...

    def is_over(self, point: Recorded) -> bool: ...

    def seconds(self, point: Recorded) -> float:
        """When a timed point that is over was reached, on the clock of ``time.perf_counter``."""
        ...


class Handle:
    """Stands for work. ``issued`` is set when it was given to its stream (then ``point`` is its end there) or, of work
    on the CPU (without a point), when it is over; also when it failed (``error``)."""

    def __init__(self, queue: Queue | None) -> None:
        self.queue = queue
        self.issued = threading.Event()
        self.point: Recorded | None = None
        self.error: BaseException | None = None
        self.begun: Recorded | None = None
        self.seconds: tuple[float, float] | None = None

    def done(self, point: Recorded | None) -> None:
        self.point = point
        self.issued.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.issued.set()


class _Item:
    """Work on its way through a thread; ``operation`` None: not an operation, only to be called in the queue's turn."""

    def __init__(
        self,
        operation: Operation | None,
        handle: Handle,
        waits: Sequence[Handle],
        work: Callable[[], None],
        timed: bool,
    ) -> None:
        self.operation = operation
        self.handle = handle
        self.waits = waits
        self.work = work
        self.timed = timed


class _Core:
    """What threads know. They do not know the :class:`Issuer`, so that it, and they, can end."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.lock = threading.Lock()
        self.error: BaseException | None = None
        self.backlog = dict.fromkeys(Queue, 0)

    def do(self, item: _Item) -> None:
        """Wait on the host for what ``item`` needs there, then give it to its stream or, on the CPU's queue, do it."""
        try:
            for wait in item.waits:
                wait.issued.wait()
                if wait.error is not None:
                    item.handle.fail(wait.error)
                    return
            # A failure elsewhere: state is torn already, nothing more is done.
            if self.error is not None:
                item.handle.fail(self.error)
            elif item.handle.queue is Queue.CPU:
                self._work(item)
            else:
                self._issue(item)
        except BaseException as error:
            if item.operation is not None:
                error.add_note(f"in the {item.operation.kind} of subgroup {item.operation.subgroup}")
            with self.lock:
                self.error = self.error or error
            item.handle.fail(error)
            if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                raise

    def _issue(self, item: _Item) -> None:
        queue = item.handle.queue
        assert queue is not None
        for wait in item.waits:
            # Work of the same queue comes before it anyway, and work on the CPU is over.
            if wait.point is not None and wait.queue is not queue:
                self.streams.wait(queue, wait.point)
        with self.streams.on(queue):
            if item.timed:
                item.handle.begun = self.streams.record(queue, timed=True)
            item.work()
            item.handle.done(self.streams.record(queue, timed=item.timed))

    def _work(self, item: _Item) -> None:
        for wait in item.waits:
            if wait.point is not None:
                self.streams.synchronize(wait.point)
        start = time.perf_counter()
        item.work()
        if item.timed:
            item.handle.seconds = start, time.perf_counter()
        item.handle.done(None)


def _serve(core: _Core, queue: Queue, items: SimpleQueue[_Item | None]) -> None:
    try:
        core.streams.enter()
    except BaseException as error:
        # What was given to this thread is refused by it, item by item.
        with core.lock:
            core.error = core.error or error
    while (item := items.get()) is not None:
        core.do(item)
        with core.lock:
            core.backlog[queue] -= 1
        # Tensors of the work must not outlive it here, while the thread waits for more.
        del item


class Issuer:
    """Queues over ``streams``. All methods may be called by any thread, one at a time where order matters."""

    def __init__(self, streams: Streams) -> None:
        self._core = _Core(streams)
        self._streams = streams
        self._giving = threading.Lock()
        self._items: dict[Queue, SimpleQueue[_Item | None]] = {}
        self._measures = False
        self._given: list[tuple[Operation, Handle]] = []
        weakref.finalize(self, _end, self._items)

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Handle:
        """:meth:`~pretrain.optim.offload.device.Device.run`; a failure of ``work`` is told by :meth:`hold` and
        :meth:`finish`, whoever did it.

        Raises:
            RuntimeError: earlier work failed; nothing more is done.
        """
        if self._core.error is not None:
            raise RuntimeError("no more work is done after an earlier operation failed") from self._core.error
        handle = Handle(operation.queue)
        if self._measures:
            self._given.append((operation, handle))
        self._give(_Item(operation, handle, [_handle(wait) for wait in waits], work, self._measures))
        return handle

    def after(self, event: Event, call: Callable[[], None]) -> None:
        """Call ``call`` in the turn of ``event``'s queue, once its work was given to its stream or, on the CPU, is
        over."""
        handle = _handle(event)
        if handle.queue is None:
            call()
        else:
            self._give(_Item(None, Handle(handle.queue), [], call, False))

    def mark(self) -> Handle:
        handle = Handle(None)
        handle.done(self._streams.record(None, timed=self._measures))
        return handle

    def hold(self, events: Iterable[Event]) -> None:
        """The model's stream waits; for work on the CPU, and what waits for that, the host does.

        Raises:
            the failure of any of it.
        """
        for handle in self._issued(events):
            if handle.point is not None:
                self._streams.wait(None, handle.point)

    def finish(self, events: Iterable[Event]) -> None:
        """Raises:
        the failure of any of it.
        """
        for handle in self._issued(events):
            if handle.point is not None:
                self._streams.synchronize(handle.point)

    def measure(self, on: bool) -> None:
        self._measures, self._given = on, []

    def collect(self) -> list[OperationTime]:
        told: list[OperationTime] = []
        kept: list[tuple[Operation, Handle]] = []
        for operation, handle in self._given:
            if not handle.issued.is_set() or (handle.point is not None and not self._streams.is_over(handle.point)):
                kept.append((operation, handle))
            elif handle.error is None:
                start, end = handle.seconds or (
                    self._streams.seconds(handle.begun),
                    self._streams.seconds(handle.point),
                )
                told.append(OperationTime(operation, start, end))
        self._given = kept
        return told

    def time(self, event: Event) -> float | None:
        point = _handle(event).point
        return self._streams.seconds(point) if point is not None and self._streams.is_over(point) else None

    def _give(self, item: _Item) -> None:
        queue = item.handle.queue
        assert queue is not None
        # Two callers must not overtake each other between looking and giving.
        with self._giving:
            with self._core.lock:
                later = queue is Queue.CPU or self._core.backlog[queue] or not _all_issued(item.waits)
                if later:
                    self._core.backlog[queue] += 1
            if later:
                self._thread(queue).put(item)
            else:
                self._core.do(item)

    def _thread(self, queue: Queue) -> SimpleQueue[_Item | None]:
        if queue not in self._items:
            self._items[queue] = SimpleQueue()
            arguments = (self._core, queue, self._items[queue])
            threading.Thread(target=_serve, args=arguments, name=f"offload {queue}", daemon=True).start()
        return self._items[queue]

    def _issued(self, events: Iterable[Event]) -> list[Handle]:
        handles = [_handle(event) for event in events]
        for handle in handles:
            handle.issued.wait()
        for handle in handles:
            if handle.error is not None:
                raise handle.error
        return handles


def _end(items: dict[Queue, SimpleQueue[_Item | None]]) -> None:
    for waiting in items.values():
        waiting.put(None)


def _all_issued(handles: Sequence[Handle]) -> bool:
    return all(handle.issued.is_set() for handle in handles)


def _handle(event: Event) -> Handle:
    if not isinstance(event, Handle):
        raise TypeError(f"{event!r} is no event of this device")
    return event
