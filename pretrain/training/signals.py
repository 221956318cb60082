"""Stop requests: a signal only sets a flag, which all ranks agree on at the next step boundary. Torch-free."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Becomes true when one of ``signals`` arrives.

    A handler that saved at once would save at different steps on different ranks.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)) -> None:
        self.signal_name: str | None = None
        self._signals = signals

    def install(self) -> None:
        for number in self._signals:
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
