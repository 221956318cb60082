"""The loop by itself, on a stand-in engine: what it records, when it stops, what it refuses."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config.schema import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from pretrain.engines.base import EvalResult, StepResult
from pretrain.training.callback import Callback
from pretrain.training.evaluate import evaluate
from pretrain.training.loop import NonFiniteError, Trainer
from pretrain.training.signals import StopRequest
from pretrain.training.state import StepRecord, TrainState


class Objective:
    def denominator(self, batch: dict[str, torch.Tensor]) -> float:
        return float(batch["mask"].sum())


class Engine:
    """Loss sum of 2 nats a target; keeps what it was asked."""

    device = torch.device("cpu")
    dp_rank, dp_size = 0, 1
    is_data_leader = True

    def __init__(self, loss: float = 2.0) -> None:
        self.loss = loss
        self.calls: list[tuple[float, float]] = []
        self.seen: list[int] = []

    def train_step(
        self, microbatches: Sequence[Any], loss: Any, denominator: float, learning_rate: float, accept: Any
    ) -> StepResult:
        self.calls.append((denominator, learning_rate))
        targets = sum(float(batch["mask"].sum()) for batch in microbatches)
        result = StepResult(self.loss * targets, 1.0, {"hits": targets / 2}, {"forward": 0.1})
        accept(result)
        return result

    def eval_step(self, batch: dict[str, torch.Tensor], loss: Any) -> EvalResult:
        self.seen += batch["index"].tolist()
        return EvalResult(float((batch["index"] * batch["mask"].sum(1)).sum()))


class Stream:
    """Step t holds two micro-batches of t + 1 targets each."""

    def __init__(self, first: int, count: int) -> None:
        self.steps = range(first, first + count)
        self.closed = False

    def __iter__(self) -> Iterator[list[dict[str, np.ndarray]]]:
        for step in self.steps:
            mask = np.zeros((2, 8), dtype=bool)
            mask[0, : step + 1] = True
            yield [{"mask": mask}, {"mask": mask}]

    def close(self) -> None:
        self.closed = True


class Recorder(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.records: list[StepRecord] = []
        self.ended: bool | None = None
        self.stop_at = stop_at
        self.cut_short = False

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)
        if record.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        self.ended = interrupted
        return self.cut_short


def trainer(
    engine: Engine, recorder: Recorder, *, start: int = 0, count: int = 10, steps: int = 5
) -> tuple[Trainer, Any]:
    streams = []

    def open_stream(first: int, skipped: frozenset[int]) -> Stream:
        streams.append(Stream(first, count))
        return streams[-1]

    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=4),
        optimizer=OptimizerConfig(
            learning_rate=1.0, schedule=ScheduleConfig(kind="linear", horizon=5, final_ratio=0.0)
        ),
    )
    stop = StopRequest((signal.SIGUSR1,))
    stop.install()
    made = Trainer(
        config=config,
        engine=engine,  # type: ignore[arg-type]
        objective=Objective(),
        open_stream=open_stream,  # type: ignore[arg-type]
        state=TrainState(step=start, samples=4 * start),
        stop=stop,
        callbacks=[recorder],
    )
    return made, streams


@pytest.fixture(autouse=True)
def restore_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_loss_is_normalised_by_the_targets_of_the_whole_step() -> None:
    engine, recorder = Engine(), Recorder()
    made, streams = trainer(engine, recorder)
    assert made.run() is False
    assert [call[0] for call in engine.calls] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert [record.loss for record in recorder.records] == [2.0] * 5
    assert [record.metrics["hits"] for record in recorder.records] == [0.5] * 5
    assert [rate for _, rate in engine.calls] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert (made.state.step, made.state.samples, made.state.tokens) == (5, 20, 30)
    assert recorder.ended is False
    assert streams[0].closed


def test_continues_where_the_state_says() -> None:
    engine, recorder = Engine(), Recorder()
    made, streams = trainer(engine, recorder, start=3)
    made.run()
    assert streams[0].steps.start == 3
    assert [record.step for record in recorder.records] == [4, 5]
    assert [rate for _, rate in engine.calls] == pytest.approx([0.25, 0.0])


def test_a_signal_stops_at_the_next_step_boundary() -> None:
    engine, recorder = Engine(), Recorder(stop_at=2)
    made, streams = trainer(engine, recorder)
    assert made.run() is True
    assert made.state.step == 2
    assert recorder.ended is True
    assert streams[0].closed


def test_a_last_validation_that_is_cut_short_leaves_the_run_interrupted() -> None:
    recorder = Recorder()
    recorder.cut_short = True
    made, _ = trainer(Engine(), recorder)
    assert made.run() is True
    assert made.state.step == 5


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_without_a_record(loss: float) -> None:
    recorder = Recorder()
    made, streams = trainer(Engine(loss), recorder)
    with pytest.raises(NonFiniteError, match=r"Step 1: loss .* global samples 0\.\.3"):
        made.run()
    assert recorder.records == []
    assert recorder.ended is None
    assert streams[0].closed


def test_a_source_that_ends_early_is_explained() -> None:
    made, _ = trainer(Engine(), Recorder(), count=2)
    with pytest.raises(ValueError, match="ended after 8 samples, at step 2 of 5"):
        made.run()


def test_a_step_without_targets_is_refused() -> None:
    class Empty(Stream):
        def __iter__(self) -> Iterator[list[dict[str, np.ndarray]]]:
            yield [{"mask": np.zeros((2, 8), dtype=bool)}]

    made, _ = trainer(Engine(), Recorder())
    made._open_stream = lambda first, skipped: Empty(first, 1)  # type: ignore[assignment,return-value]
    with pytest.raises(ValueError, match="no target token"):
        made.run()


class Source:
    num_samples, num_bytes = 7, 21

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        mask = np.zeros((len(indices), 4), dtype=bool)
        mask[:, :2] = True
        return {"mask": mask, "index": np.array(indices)}


def test_validation_covers_each_sample_once_and_counts_bytes() -> None:
    engine = Engine()
    metrics = evaluate(engine, Objective(), Source(), batch_size=3)  # type: ignore[arg-type]
    assert sorted(engine.seen) == list(range(7))
    nats = sum(range(7)) * 2
    assert metrics["validation_loss"] == pytest.approx(nats / 14)
    assert metrics["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / 21)
    stop = StopRequest((signal.SIGUSR1,))
    assert evaluate(engine, Objective(), Source(), batch_size=1, stop=stop) is not None  # type: ignore[arg-type]
    stop.note(signal.SIGUSR1)
    assert evaluate(engine, Objective(), Source(), batch_size=1, stop=stop) is None  # type: ignore[arg-type]
    part = evaluate(engine, Objective(), Source(), batch_size=3, num_samples=4)  # type: ignore[arg-type]
    # Spread over the source, not its first samples: 0, 1, 3, 5 of 7.
    assert part == {"validation_loss": pytest.approx((0 + 1 + 3 + 5) * 2 / 8)}
