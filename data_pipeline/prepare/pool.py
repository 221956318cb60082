"""Units of work in processes of their own, or in this one: results as they come, deaths as errors.

Why not ``ProcessPoolExecutor``: a failure would wait for every running unit (minutes), it does not say which
process died of what, and counters would need a second channel.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

from data_pipeline.prepare.metering import Counts, Meter


class Job(Protocol):
    """What runs in a process: made there once by a ``make`` function, then called for each unit."""

    def __call__(self, stage: str, unit: int, meter: Meter) -> None: ...


Make = Callable[..., Job]


class Workers:
    """``count`` processes that run ``make(*arguments)``; none, and the work is done here, for a count of 1.

    Use as a context: leaving it ends the processes at once, whatever they do.
    """

    def __init__(self, count: int, make: Make, *arguments: Any) -> None:
        self._count, self._make, self._arguments = count, make, arguments
        self._processes: dict[Connection, BaseProcess] = {}
        self._here: Job | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.terminate()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()
        self._processes.clear()

    def run(
        self, stage: str, units: Iterable[int], counted: Callable[[Counts], None], worthwhile: bool = True
    ) -> Iterator[int]:
        """Do ``units`` of ``stage``; yields each when it is finished. ``counted`` gets counters on the way. Work
        that is not ``worthwhile`` does not start processes, but uses those that are there.

        Raises what a unit raised, ChildProcessError when a process dies.
        """
        pending = list(units)[::-1]
        if self._count == 1 or (not self._processes and (len(pending) <= 1 or not worthwhile)):
            self._here = self._here or self._make(*self._arguments)
            meter = Meter(counted)
            while pending:
                unit = pending.pop()
                self._here(stage, unit, meter)
                meter.flush()
                yield unit
            return
        self._start(min(self._count, len(pending)))
        running: dict[Connection, int] = {}
        for pipe in self._processes:
            if pending:
                running[pipe] = pending.pop()
                self._send(pipe, stage, running[pipe])
        while running:
            ready: list[Any] = connection.wait(list(running))
            for pipe in ready:
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(pipe, stage, running[pipe]) from None
                if kind == "counts":
                    counted(value)
                elif kind == "error":
                    raise value
                else:
                    unit = running.pop(pipe)
                    if pending:
                        running[pipe] = pending.pop()
                        self._send(pipe, stage, running[pipe])
                    yield unit

    def _start(self, count: int) -> None:
        # Spawned, not forked: the tokenizers library holds threads in this process.
        context = get_context("spawn")
        while len(self._processes) < count:
            ends: tuple[Any, Any] = context.Pipe()
            ours, theirs = ends
            process = context.Process(target=_serve, args=(theirs, self._make, self._arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def _send(self, pipe: Connection, stage: str, unit: int) -> None:
        try:
            pipe.send((stage, unit))
        except OSError:  # a broken pipe or a reset connection
            raise self._death(pipe, stage, unit) from None

    def _death(self, pipe: Connection, stage: str, unit: int) -> ChildProcessError:
        process = self._processes[pipe]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return ChildProcessError(
            f"a process of prepare {how} at unit {unit} of stage {stage!r}"
            + (", most likely for want of memory" if code == -signal.SIGKILL else "")
            + ". What to do: run the same command again, with fewer --workers if memory is short; finished work "
            "is kept."
        )


def _serve(pipe: Connection, make: Make, arguments: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which ends its processes
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # A killed parent would otherwise leave its processes behind, at work or idle.
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        job = make(*arguments)
        meter = Meter(lambda counts: pipe.send(("counts", counts)))
        while True:
            stage, unit = pipe.recv()
            job(stage, unit, meter)
            meter.flush()
            pipe.send(("done", unit))
    except EOFError:
        return
    except Exception as error:
        pipe.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way to the command, else one of the same meaning."""
    if not isinstance(error, (OSError, ValueError)):
        error.add_note(traceback.format_exc())  # ours to solve
    with contextlib.suppress(Exception):  # its constructor may take other arguments
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    if isinstance(error, OSError):
        return OSError(str(error))
    return ValueError(str(error)) if isinstance(error, ValueError) else RuntimeError(traceback.format_exc())
