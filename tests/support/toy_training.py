"""The real loop and checkpoint callback around an engine whose state is a known function of the step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.schema import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from pretrain.engines.base import StepResult
from pretrain.parallel.shard import Shard
from pretrain.training.callback import Callback
from pretrain.training.callbacks import CheckpointCallback
from pretrain.training.loop import Trainer
from pretrain.training.signals import StopRequest
from pretrain.training.state import TrainState

SHAPE = (64, 512)


def state_at(step: int) -> torch.Tensor:
    """The engine's weight after ``step`` steps."""
    return torch.arange(64 * 512, dtype=torch.float32).reshape(SHAPE) + step


class ToyEngine:
    """Holds its share of the columns of one weight; a step adds 1 to it."""

    device = torch.device("cpu")
    dp_rank, dp_size, is_data_leader, module = 0, 1, True, None

    def __init__(self, rank: int, size: int, step: int = 0, during_step: Callable[[int], None] | None = None) -> None:
        self.shard = Shard.split(SHAPE, 1, rank, size)
        self.share = state_at(step).chunk(size, dim=1)[rank].clone()
        self.step = step
        self.loss = 1.0
        self.during_step = during_step

    def train_step(
        self, microbatches: Any, loss: Any, denominator: float, learning_rate: float, accept: Any
    ) -> StepResult:
        result = StepResult(self.loss, 1.0, {}, {"forward": 0.0})
        if not accept(result):
            return result
        self.step += 1
        if self.during_step:
            self.during_step(self.step)
        self.share += 1
        return result

    def export_state(self) -> Iterator[Fragment]:
        flat = self.share.view(-1)
        half = flat.numel() // 2 + 3
        yield Fragment("w", "master", SHAPE, 0, flat[:half], self.shard)
        yield Fragment("w", "master", SHAPE, half, flat[half:], self.shard)

    def scalar_state(self) -> dict[str, float]:
        return {"step": float(self.step)}


class Log:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]


class _Objective:
    def denominator(self, batch: dict[str, torch.Tensor]) -> float:
        return 1.0


class _Stream:
    def __iter__(self) -> Iterator[list[dict[str, np.ndarray]]]:
        while True:
            yield [{"tokens": np.zeros((1, 2), dtype=np.int64)}]

    def close(self) -> None:
        pass


def toy_trainer(
    root: Path,
    log: Any,
    rank: int = 0,
    size: int = 1,
    *,
    engine: ToyEngine | None = None,
    more: Sequence[Callback] = (),
    fence: Callable[[], None] = lambda: None,
    **train: Any,
) -> Trainer:
    """A trainer that checkpoints into ``root``; ``train`` are fields of the train section."""
    made = engine or ToyEngine(rank, size)
    callback = CheckpointCallback(CheckpointStore(root), log, rank=rank, attempt=1, fence=fence, facts={})
    return Trainer(
        config=Config(
            train=TrainConfig(**{"global_batch_size": 1, **train}),
            optimizer=OptimizerConfig(schedule=ScheduleConfig(horizon=100)),
        ),
        engine=made,  # type: ignore[arg-type]
        objective=_Objective(),
        open_stream=lambda first, skipped: _Stream(),  # type: ignore[arg-type,return-value]
        state=TrainState(step=made.step),
        stop=StopRequest((signal.SIGUSR1,)),
        callbacks=[callback, *more],
    )


def check_content(folder: Path) -> None:
    """The checkpoint holds exactly the state of its step."""
    reader = CheckpointReader(folder)
    step = reader.training["step"]
    assert folder.name == f"step_{step:08d}"
    assert reader.training["optimizer_scalars"] == {"step": float(step)}
    assert torch.equal(reader.tensor("w", "master"), state_at(step))
