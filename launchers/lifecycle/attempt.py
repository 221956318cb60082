"""Following one attempt from its started ranks to its last end: signals, failures, deadline, hangs, lost leases.

Torch-free. It knows neither processes nor Slurm: ranks are a :class:`launchers.lifecycle.ranks.Ranks`, and what may
end the attempt from outside comes as small functions that are asked in every round.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from launchers.exit_codes import ExitCode
from launchers.lifecycle.exit_class import STOP_CODES, ExitClass, RankEnd, StopReason
from launchers.lifecycle.ranks import Ranks

POLL_INTERVAL_S = 0.25
AFTER_DEATH_S = 15.0
"""A rank that was killed leaves the others no way to save together: they get this long to end, at most."""

_ALLOCATION_ENDS = (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT)

Watcher = Callable[[], StopReason | None]
"""Asked in every round; the first reason that one gives ends the attempt."""


class Display(Protocol):
    """What is shown while ranks run (see :mod:`launchers.progress`)."""

    def poll(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Attempt:
    """One attempt. ``grace_s``: seconds between asking ranks to stop and killing them.

    ``received`` are signals to this process, appended by its handlers. ``reason_of`` says what one means (None: it asks
    for nothing, and is taken out); with ``second_kills`` a second one kills the ranks. A reason that is enforced leaves
    no more than ``enforced_grace_s``. ``lost`` is set when another process holds the run directory.
    ``reasons`` may ask for a stop with a checkpoint, ``alarms`` for an end at once.
    """

    ranks: Ranks
    grace_s: float
    received: list[int]
    reason_of: Callable[[int], StopReason | None]
    second_kills: bool = True
    enforced_grace_s: float = 120.0
    display: Display | None = None
    lost: threading.Event | None = None
    reasons: Sequence[Watcher] = ()
    alarms: Sequence[Watcher] = ()
    stop: StopReason | None = None
    fenced: bool = False
    first_failure: RankEnd | None = None
    asked: bool = False
    _deadline: float | None = None
    _grace: float = 0.0
    _heard: int = 0

    def follow(self) -> list[RankEnd]:
        """Watches until all ranks have ended; returns how."""
        while running := self.ranks.num_running():
            self._note_failure()
            self._act_on_signals(running)
            self._act_on_reasons(running)
            if self.lost is not None and self.lost.is_set():
                say("another process has taken over this run directory: stopping the ranks without saving")
                self.fenced, self.lost = True, None
                self._kill()
            if self._deadline is not None and time.monotonic() > self._deadline:
                say(f"ranks still running {self._grace:g} s after being asked to stop: killing them")
                self._kill()
            self.show()
            self.ranks.wait(POLL_INTERVAL_S)
        self._note_failure()
        return list(self.ranks.ends())

    def show(self) -> None:
        """Updates the display. One that fails (terminal closed, pipe gone) is given up: the ranks go on."""
        if self.display is not None:
            try:
                self.display.poll()
            except Exception as error:
                self.display = None
                say(f"the progress display failed and is off ({error}); see metrics.jsonl and the rank logs")

    def close_display(self) -> None:
        self.show()
        if self.display is not None:
            with contextlib.suppress(OSError):
                self.display.close()

    def _note_failure(self) -> None:
        """On the first end that is no success, asks the other ranks to stop: alone they would wait for it for ever."""
        failed = [end for end in self.ranks.ends() if end.code]
        if self.first_failure is not None or not failed:
            return
        # Of ranks that end within one look, a death by signal is the cause and the others its consequence.
        self.first_failure = min(failed, key=lambda end: ((end.code or 0) < 128, end.rank))
        code, asked = self.first_failure.code or 0, self.asked
        # A rank that saved and left ends with the others: they need time, not a signal amid their last writes.
        if code != ExitCode.RESUMABLE and not self.asked:
            self._ask()
        self._start_grace(self.grace_s)
        if code > 128 and not (asked and code in STOP_CODES):  # not one that the request itself struck on its way out
            self._limit_grace(min(self.grace_s, AFTER_DEATH_S))

    def _act_on_signals(self, running: int) -> None:
        if self.second_kills and len(self.received) > 1 and self._heard < len(self.received):
            self._heard = len(self.received)
            say("second signal: killing the ranks")
            self._kill()
        while self._heard < len(self.received):
            number = self.received[self._heard]
            # Also with a reason at hand: a batch system that asked first may come to enforce it.
            if (reason := self.reason_of(number)) is None:
                del self.received[self._heard]  # or it would count for later attempts
                continue
            self._heard += 1
            if self.stop is None:
                more = " (a second signal kills them)" if self.second_kills else ""
                self._stop(reason, running, signal.Signals(number).name if self.second_kills else reason.words, more)
            elif reason.exit_class == ExitClass.INTERRUPTED and self.stop.exit_class in _ALLOCATION_ENDS:
                self.stop = reason  # cancelled since: it must not come back
            elif reason.enforced and not self.stop.enforced:
                self.stop = replace(self.stop, enforced=True)
            if reason.enforced:
                self._limit_grace(self.enforced_grace_s)

    def _act_on_reasons(self, running: int) -> None:
        if self.stop is None:
            for watcher in self.reasons:
                if (reason := watcher()) is not None:
                    self._stop(reason, running, reason.words)
                    break
        for watcher in self.alarms:
            if (reason := watcher()) is not None:
                self.stop = self.stop if self.stop is not None and self.asked else reason
                say(f"{reason.words}: killing the ranks")
                self._kill()

    def _stop(self, reason: StopReason, running: int, words: str, more: str = "") -> None:
        self.stop = reason
        if not self.asked:
            say(f"{words}: asked {running} rank(s) to save and stop within {self.grace_s:g} s{more}")
            self._ask()
        self._start_grace(self.grace_s)

    def _ask(self) -> None:
        self.asked = True
        self.ranks.ask_to_stop()

    def _start_grace(self, seconds: float) -> None:
        if self._deadline is None:
            self._limit_grace(seconds)

    def _limit_grace(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if self._deadline is None or until < self._deadline:
            self._deadline, self._grace = until, seconds

    def _kill(self) -> None:
        self._deadline = None
        self.ranks.kill()


def say(message: str) -> None:
    """A line of the launcher's own, for whoever still listens."""
    with contextlib.suppress(OSError, ValueError):
        print(f"pretrain: {message}", file=sys.stderr, flush=True)
