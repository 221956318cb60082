"""Stop requests: a signal only sets a flag, which all ranks agree on at the next step boundary. Torch-free."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_INTERVAL_S = 0.1

Result = TypeVar("Result")


class StopRequestedError(Exception):
    """The process was asked to stop while it waited for something that it need not wait for any more."""


class StopRequest:
    """Becomes true when one of ``signals`` arrives.

    A handler that saved at once would save at different steps on different ranks.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self.signal_name: str | None = None
        self._signals = signals

    def install(self) -> None:
        """Handle the signals in this process; processes forked from it do not."""
        for number in self._signals:
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=self._leave_to_parent)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def note(self, number: int) -> None:
        """Take in a signal that another thread learned of: the main thread runs no handler amid a call into C."""
        if number in self._signals:
            self.signal_name = signal.Signals(number).name

    def check(self) -> None:
        """Raises StopRequestedError when the process was asked to stop."""
        if self.requested:
            raise StopRequestedError(f"asked to stop by {self.signal_name}")

    def while_waiting(self, action: Callable[[], Result]) -> Result:
        """Result of ``action``, or its exception; raises StopRequestedError as soon as a stop is requested.

        ``action`` runs in a thread of its own, which is left behind at a stop request: it must be one that waits (for
        a file system, for a server) and whose result is then wanted by nobody.
        """
        self.check()
        outcome: list[Result] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                outcome.append(action())
            except BaseException as error:
                failure.append(error)
            finally:
                done.set()

        threading.Thread(target=run, name="while-waiting", daemon=True).start()
        while not done.wait(POLL_INTERVAL_S):
            self.check()
        if failure:
            raise failure[0]
        return outcome[0]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.note(number)

    def _leave_to_parent(self) -> None:
        # Signals of a job step reach every process in it, but a stop is for ranks: helpers work on while the rank
        # saves. SIGTERM ends them, because that is how a rank stops its helpers.
        for number in self._signals:
            with contextlib.suppress(ValueError):  # forked from another thread than the main one
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
