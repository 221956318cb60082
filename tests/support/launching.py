"""Starting and following small programs as local ranks, as the supervisor does with training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

from launchers.lifecycle.attempt import Attempt, Display
from launchers.lifecycle.exit_class import ExitClass, StopReason
from launchers.local import start_ranks
from launchers.run_dir import RunDir


def launch(
    run: RunDir,
    *,
    attempt: int,
    num_processes: int,
    command: Sequence[str],
    threads_per_process: int | None = None,
    shutdown_grace_s: float = 120.0,
    display: Display | None = None,
    lost: threading.Event | None = None,
) -> int:
    """Starts ``command`` as every rank and waits; returns the exit code of the one that failed first, or 0."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, lambda number, _frame: received.append(number)) for n in numbers}
    try:
        with start_ranks(
            run,
            attempt=attempt,
            num_processes=num_processes,
            threads_per_process=threads_per_process,
            program=command,
        ) as ranks:
            following = Attempt(
                ranks,
                shutdown_grace_s,
                received,
                lambda number: StopReason(ExitClass.INTERRUPTED, signal.Signals(number).name),
                display=display,
                lost=lost,
            )
            following.follow()
            following.close_display()
            return following.first_failure.code or 0 if following.first_failure is not None else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
