"""Numerical health: what makes a step bad, and what is then done. Torch-free.

The judge sees numbers that are the same on all ranks and keeps nothing else, so all ranks judge alike without a word
between them, and a continued run judges as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.config.launch_schema import HealthConfig

Kind = Literal["nonfinite", "spike"]
Action = Literal["stop", "skip", "rollback"]

_MAD_TO_SIGMA = 1.4826
_SMALLEST_DEVIATION = 1e-3
"""Share of the median below which losses count as equal: where they hardly vary, not every rise is a spike."""


@dataclass(frozen=True)
class Fault:
    """Why a step is bad. ``zscore`` and ``median`` of the losses looked back on, for a spike."""

    kind: Kind
    action: Action
    loss: float
    grad_norm: float
    median: float | None = None
    zscore: float | None = None

    def describe(self) -> str:
        if self.kind == "nonfinite":
            return f"loss {self.loss}, gradient norm {self.grad_norm}"
        return (
            f"loss {self.loss:.6g} stands {self.zscore:.1f} robust standard deviations above the median "
            f"{self.median:.6g}, gradient norm {self.grad_norm:.6g}"
        )


@dataclass(frozen=True)
class BadStep:
    """A step whose update was dropped, and what follows: the same on every rank.

    Attributes:
        step: number that the step would have had.
        batch: its batch; ``first_sample`` and ``num_samples`` are the global samples in it.
        action: what is done (``stop`` also where the policy says otherwise, then ``reason`` tells why).
        skipped: batches that are left out because of it.
        skipped_before: all that were left out when the step ran.
        to_step: with a rollback, the step of the checkpoint gone back to.
    """

    step: int
    batch: int
    first_sample: int
    num_samples: int
    fault: Fault
    action: Action
    skipped: list[int] = field(default_factory=list)
    skipped_before: list[int] = field(default_factory=list)
    to_step: int | None = None
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        facts: dict[str, Any] = {
            "kind": self.fault.kind,
            "action": self.action,
            "loss": self.fault.loss,
            "grad_norm": self.fault.grad_norm,
            "median": self.fault.median,
            "zscore": self.fault.zscore,
            "batch": self.batch,
            "sample_ids": [self.first_sample, self.first_sample + self.num_samples - 1],
            "skipped": self.skipped,
            "to_step": self.to_step,
            "reason": self.reason,
        }
        return {name: value for name, value in facts.items() if value is not None}


class HealthMonitor:
    """Judges steps. ``num_events`` counts the bad steps of the whole run so far."""

    def __init__(self, config: HealthConfig, num_events: int = 0) -> None:
        self.config = config
        self.num_events = num_events
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    @property
    def may_roll_back(self) -> bool:
        return "rollback" in (self.config.on_nonfinite, self.config.on_spike)

    @property
    def is_exhausted(self) -> bool:
        """Whether the next bad step stops the run, whatever the policy."""
        return self.num_events >= self.config.max_events

    def judge(self, loss: float, grad_norm: float) -> Fault | None:
        """What is wrong with a step, from its global mean loss and gradient norm; None for a good one."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Fault("nonfinite", self.config.on_nonfinite, loss, grad_norm)
        if self.config.on_spike == "ignore" or len(self._losses) < self.config.spike_window:
            return None
        median = statistics.median(self._losses)
        deviation = _MAD_TO_SIGMA * statistics.median(abs(old - median) for old in self._losses)
        zscore = (loss - median) / max(deviation, _SMALLEST_DEVIATION * abs(median), 1e-30)
        if zscore <= self.config.spike_zscore:
            return None
        return Fault("spike", self.config.on_spike, loss, grad_norm, median, zscore)

    def passed(self, loss: float) -> None:
        """A good step was made."""
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state.get("losses", []), maxlen=self.config.spike_window)


def window_before(batch: int, length: int, skipped: set[int]) -> list[int]:
    """The last ``length`` batches up to ``batch`` that are not left out already, ascending."""
    window: list[int] = []
    while batch >= 0 and len(window) < length:
        if batch not in skipped:
            window.append(batch)
        batch -= 1
    return window[::-1]
