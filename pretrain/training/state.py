"""Progress of a run: the few integers from which data order, schedule and randomness follow. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Completed optimizer steps, global samples consumed and target tokens trained on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def advance(self, samples: int, tokens: int) -> None:
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(step=int(values["step"]), samples=int(values["samples"]), tokens=int(values["tokens"]))


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step reports, equal on every rank apart from ``seconds``."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    metrics: dict[str, float]
    seconds: dict[str, float]
    memory_gib: float
    substituted: int = 0  # rows of the step that stand in for damaged ones
