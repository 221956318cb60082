"""In-order queues that run in random legal orders, with vector clocks. Torch-free."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from pretrain.optim.offload.schedule import Queue
from pretrain.optim.offload.shadow import Actor, Clock, Found, RaceError, join

MODEL = "model"
PROGRAM = "program"


class Task:
    """Work on a queue, and the event that stands for it."""

    def __init__(
        self, name: str, queue: str, waits: Sequence[Task], known: Clock, work: Callable[[], None] | None
    ) -> None:
        self.name = name
        self.queue = queue
        self.waits = waits
        self.known = known
        self.work = work
        self.clock: Clock | None = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.clock is not None

    @property
    def ready(self) -> bool:
        return all(wait.done for wait in self.waits)


class Queues:
    """Queues of the device, one of the model, and any more that :meth:`add` names.

    Args:
        around: a context for the work of every task.
    """

    def __init__(self, source: random.Random, around: Callable[[], AbstractContextManager[Any]]) -> None:
        self._random = source
        self._around = around
        self._queues: dict[str, deque[Task]] = {name: deque() for name in (MODEL, *Queue)}
        self.clocks: dict[str, Clock] = {name: {name: 0} for name in (*self._queues, PROGRAM)}
        self.running: Actor | None = None
        self.error: BaseException | None = None
        self.trace: list[str] = []
        self._mood = "some"
        self._starved = ""

    def add(self, queue: str) -> None:
        self._queues[queue] = deque()
        self.clocks[queue] = {queue: 0}

    def give(
        self,
        name: str,
        queue: str,
        waits: Iterable[object],
        work: Callable[[], None] | None,
        known: Clock | None = None,
    ) -> Task:
        clock = self.clocks[PROGRAM]
        task = Task(name, queue, [as_task(wait) for wait in waits], dict(clock) if known is None else known, work)
        self._queues[queue].append(task)
        clock[PROGRAM] += 1
        return task

    def advance(self) -> None:
        """A moment of the program passes: anything may happen, or nothing."""
        if self.running is not None:
            raise RaceError(Found.SIDE, f"{self.running} gives work to queues")
        if isinstance(self.error, RaceError):
            raise self.error
        if self._random.random() < 0.2:
            self._mood = self._random.choice(["nothing", "everything", "some", "one starves"])
            self._starved = self._random.choice(list(self._queues))
        while (ready := self.runnable()) and self._goes_on():
            if self._mood == "one starves":
                ready = [task for task in ready if task.queue != self._starved]
                if not ready:
                    return
            self.pick(ready)

    def _goes_on(self) -> bool:
        return {"nothing": 0.0, "everything": 1.0, "some": 0.5, "one starves": 1.0}[self._mood] > self._random.random()

    def runnable(self) -> list[Task]:
        return [queue[0] for queue in self._queues.values() if queue and queue[0].ready]

    def reach(self, goal: Task) -> None:
        """Do what ``goal`` needs, and perhaps other things."""
        while not goal.done:
            needed = self._needed(goal)
            ready = self.runnable()
            if self._random.random() < 0.7:
                ready = [task for task in ready if task in needed]
            self.pick(ready)

    def _needed(self, goal: Task) -> set[Task]:
        found: set[Task] = set()
        todo = [goal]
        while todo:
            task = todo.pop()
            if task.done or task in found:
                continue
            found.add(task)
            todo += task.waits
            for before in self._queues[task.queue]:
                if before is task:
                    break
                todo.append(before)
        return found

    def pick(self, ready: list[Task]) -> None:
        self._execute(self._random.choice(ready))

    def _execute(self, task: Task) -> None:
        self._queues[task.queue].popleft()
        clock = self.clocks[task.queue]
        join(clock, task.known)
        for wait in task.waits:
            join(clock, wait.clock or {})
        clock[task.queue] += 1
        failed = next((wait.error for wait in task.waits if wait.error is not None), None)
        work, task.work = task.work, None
        if task.queue in tuple(Queue) and (failed is not None or self.error is not None):
            task.error = failed or self.error
        elif work is not None:
            self.running = Actor(task.name, task.queue, dict(clock))
            try:
                with self._around():
                    work()
            except RaceError as error:
                self.error = error
                raise
            except Exception as error:
                self.error = task.error = error
            finally:
                self.running = None
            self.trace.append(task.name)
        task.clock = dict(clock)
        task.waits = ()

    def learn(self, task: Task) -> None:
        join(self.clocks[PROGRAM], task.clock or {})

    def check_usable(self) -> None:
        if self.error is not None:
            raise RuntimeError("the device does no more work after an earlier failure") from self.error

    def settle(self) -> None:
        """Do everything, and wait for it."""
        while any(self._queues.values()):
            self.pick(self.runnable())
        for clock in list(self.clocks.values()):
            join(self.clocks[PROGRAM], clock)


def as_task(event: object) -> Task:
    if not isinstance(event, Task):
        raise TypeError(f"{event!r} is no event of a simulated device")
    return event
