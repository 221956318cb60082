"""The real loop with a real engine, checkpoints and health policy, on batches of which some are bad."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import lm_case

from data_pipeline.source import DataSources
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.launch_schema import HealthConfig
from pretrain.objectives.next_token import NextTokenObjective
from pretrain.parallel.process import ProcessEnvironment
from pretrain.training.callback import Callback
from pretrain.training.callbacks import CheckpointCallback
from pretrain.training.health import BadStep, HealthMonitor
from pretrain.training.health_callback import HealthCallback
from pretrain.training.health_records import HealthRecords
from pretrain.training.loop import Trainer
from pretrain.training.resume import resume
from pretrain.training.rollback import Rollback
from pretrain.training.signals import StopRequest
from pretrain.training.state import StepRecord

GLOBAL_BATCH = lm_case.GLOBAL_BATCH


@dataclasses.dataclass(frozen=True)
class Plan:
    """``bad``: factors of the loss by batch; ``skipped``: what is left out from the beginning."""

    case: lm_case.Case
    health: HealthConfig
    bad: Mapping[int, float] = dataclasses.field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    steps: int = 6
    checkpoint_interval: int = 2
    keep_checkpoints: int = 0
    behind: bool = True


class _Objective(NextTokenObjective):
    def __init__(self, bad: Mapping[int, float]) -> None:
        super().__init__()
        self._bad = bad

    def __call__(self, model: Any, batch: Any) -> Any:
        output = super().__call__(model, batch)
        factor = self._bad.get(int(batch["sample_ids"][0]) // GLOBAL_BATCH, 1.0)
        return output if factor == 1.0 else type(output)(output.loss_sum * factor, output.metrics)


class _Stream:
    def __init__(self, case: lm_case.Case, engine: Any, first: int, skipped: frozenset[int]) -> None:
        self._case, self._engine, self._first, self._skipped = case, engine, first, skipped

    def __iter__(self) -> Iterator[list[dict[str, np.ndarray]]]:
        micro, engine = self._case.micro_batch, self._engine
        number = self._first
        while True:
            if number not in self._skipped:
                ids = torch.arange(number * GLOBAL_BATCH, (number + 1) * GLOBAL_BATCH)
                batch = lm_case.samples(number) | {"sample_ids": ids}
                starts = range(micro * engine.dp_rank, GLOBAL_BATCH, micro * engine.dp_size)
                yield [{n: v.numpy() for n, v in lm_case.rows_of(batch, s, micro).items()} for s in starts]
            number += 1

    def close(self) -> None:
        pass


class _Source:
    def provenance(self, index: int) -> list[dict[str, Any]]:
        return [{"row": np.int64(index)}]


class Log:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})


class _Losses(Callback):
    """Losses by step as the run's history has them in the end."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.made = 0

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.losses[record.step] = record.loss
        self.made += 1


def train(rank: int, size: int, plan: Plan, root: Path) -> dict[str, Any]:
    """Train in ``root`` from its latest checkpoint, if any; losses by step, steps made, bad steps, the failure."""
    engine = lm_case.build(plan.case)
    config = plan.case.config()
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=plan.steps,
            checkpoint_interval=plan.checkpoint_interval,
            keep_checkpoints=plan.keep_checkpoints,
            async_checkpoints=plan.behind,
        ),
        health=plan.health,
    )
    env = ProcessEnvironment(rank, size, rank, 0, 1, "127.0.0.1", 1, 1)
    store = CheckpointStore(root / "checkpoints")
    state, states = resume(store, None, config, engine, env)
    state.skip(plan.skipped)
    health = HealthMonitor(plan.health)
    log, losses, seen = Log(), _Losses(), _Seen()
    sources = DataSources(train=_Source(), validation=None, tokenizer_path=None)  # type: ignore[arg-type]
    records = HealthRecords(root / "health", 1, fence=lambda: None)
    callbacks: list[Callback] = [
        HealthCallback(log, health, records, sources, rank=rank),
        CheckpointCallback(store, log, rank=rank, attempt=1, fence=lambda: None, facts={}),
        losses,
        seen,
    ]
    for callback in callbacks:
        callback.load_state_dict(states.get(callback.name, {}))
    failure = None
    try:
        Trainer(
            config=config,
            engine=engine,
            objective=_Objective(plan.bad),
            open_stream=lambda first, skipped: _Stream(plan.case, engine, first, skipped),  # type: ignore[arg-type,return-value]
            state=state,
            stop=StopRequest(()),
            callbacks=callbacks,
            health=health,
            rollback=Rollback(store, env, attempt=1, fence=lambda: None),
        ).run()
    except RuntimeError as error:
        failure = f"{type(error).__name__}: {error}"
    return {
        "losses": losses.losses,
        "made": losses.made,
        "bad": seen.bad,
        "failure": failure,
        "state": state.to_dict(),
        "finite": all(math.isfinite(loss) for loss in losses.losses.values()),
        "events": [event for event in log.events if event["event"] == "health"],
    }


class _Seen(Callback):
    def __init__(self) -> None:
        self.bad: list[BadStep] = []

    def on_bad_step(self, trainer: Trainer, bad: BadStep) -> None:
        self.bad.append(bad)
