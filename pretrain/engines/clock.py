"""Wall time of the phases of a step."""

from __future__ import annotations

import time

import torch


class Clock:
    """Wall time per phase: host clock on CPU, events on CUDA so that timing never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        if not isinstance(last := self._marks[-1][1], float):
            # Of the model's own stream only: what others still move goes on during the next step.
            last.synchronize()
        totals: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) and isinstance(after, float):
                elapsed = after - before
            else:
                assert not isinstance(before, float)
                assert not isinstance(after, float)
                elapsed = before.elapsed_time(after) / 1e3
            totals[phase] = totals.get(phase, 0.0) + elapsed
        return totals
