"""Progress of a run: the few integers from which data order, schedule and randomness follow. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Completed optimizer steps, global samples passed by and target tokens trained on.

    Batch b of a run is the global samples ``b * global_batch_size`` up to the next batch. ``skipped`` names batches
    that no step trains on (ascending): those behind have been passed over, those ahead will be. Without any, step s
    trains on batch s - 1.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: list[int] = field(default_factory=list)

    def next_batch(self, global_batch: int) -> int:
        """The batch of the next step."""
        batch = self.samples // global_batch
        left_out = set(self.skipped)
        while batch in left_out:
            batch += 1
        return batch

    def advance(self, global_batch: int, tokens: int) -> None:
        """A step was made on :meth:`next_batch`."""
        self.samples = (self.next_batch(global_batch) + 1) * global_batch
        self.step += 1
        self.tokens += tokens

    def skip(self, batches: Iterable[int]) -> None:
        """Leave out ``batches`` from now on."""
        self.skipped = sorted({*self.skipped, *batches})

    def go_back(self, values: dict[str, Any], global_batch: int) -> None:
        """Take over an earlier state of the run, but leave out what is left out now and lies ahead of it."""
        earlier = TrainState.from_dict(values)
        ahead = [batch for batch in self.skipped if batch * global_batch >= earlier.samples]
        self.step, self.samples, self.tokens = earlier.step, earlier.samples, earlier.tokens
        self.skipped = earlier.skipped
        self.skip(ahead)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(
            step=int(values["step"]),
            samples=int(values["samples"]),
            tokens=int(values["tokens"]),
            skipped=[int(batch) for batch in values.get("skipped", [])],
        )


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
