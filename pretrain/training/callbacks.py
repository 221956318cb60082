"""The loop's own callbacks: metrics, checkpoints, validation, text samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

from pretrain.checkpoint.rank_file import HostMemory
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save, Saved
from pretrain.parallel.process import gather_objects
from pretrain.parallel.pulse import PULSE
from pretrain.training.callback import Callback
from pretrain.training.evaluate import evaluate
from pretrain.training.loop import Trainer
from pretrain.training.sampling import TextSampler
from pretrain.training.state import StepRecord


class EventLog(Protocol):
    """Where rank 0 writes events; other ranks hold a log that drops them."""

    def write(self, event: str, **fields: Any) -> None: ...


class NullLog:
    def write(self, event: str, **fields: Any) -> None:
        pass


class MetricsCallback(Callback):
    """One ``train`` event every ``log_interval`` steps, and for the first and the last step."""

    name = "metrics"

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        train = trainer.config.train
        if not train.log_interval or (record.step % train.log_interval and record.step not in (1, train.steps)):
            return
        seconds = {f"{phase}_s": round(value, 6) for phase, value in record.seconds.items()}
        metrics = {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "tokens": trainer.state.tokens,
            "tokens_per_s": round(record.tokens / record.seconds["step"], 1),
            "memory_gib": round(record.memory_gib, 4),
            **seconds,
            **record.metrics,
        }
        self._log.write("train", step=record.step, metrics=metrics)


class EvaluationCallback(Callback):
    """Validation every ``eval_interval`` steps on ``eval_samples`` samples; at the end on all with ``final_eval``.

    A run that begins with given weights is validated before its first step, too.
    """

    name = "evaluation"

    def __init__(self, log: EventLog, source: Any) -> None:
        self._log = log
        self._source = source

    def on_start(self, trainer: Trainer) -> None:
        train = trainer.config.train
        if train.eval_interval and train.init_from is not None and trainer.state.step == 0:
            self._validate(trainer, train.eval_samples)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        train = trainer.config.train
        if train.eval_interval and record.step % train.eval_interval == 0 and record.step != train.steps:
            self._validate(trainer, train.eval_samples)

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        train = trainer.config.train
        if interrupted or not train.eval_interval:
            return False
        return not self._validate(trainer, None if train.final_eval else train.eval_samples)

    def _validate(self, trainer: Trainer, num_samples: int | None) -> bool:
        """Returns whether it ran to its end; a stop request ends it without a result."""
        step = trainer.state.step
        self._log.write("phase", name="validation", step=step)
        started = time.perf_counter()
        with PULSE.during("eval"):
            metrics = evaluate(
                trainer.engine,
                trainer.objective,
                self._source,
                batch_size=trainer.config.train.micro_batch_size,
                num_samples=num_samples,
                stop=trainer.stop,
            )
        if metrics is not None:
            seconds = round(time.perf_counter() - started, 3)
            self._log.write("eval", step=step, metrics=metrics, seconds=seconds)
            for callback in trainer.callbacks:
                callback.after_validation(trainer, metrics)
        return metrics is not None


class CheckpointCallback(Callback):
    """Saves every ``checkpoint_interval`` steps, at the end and at a stop request; prunes old checkpoints.

    With ``async_checkpoints`` training goes on once the state is copied; the checkpoint is published at the first step
    boundary at which all ranks have written. One save is under way at a time. The last one is synchronous: nothing
    would overlap with it.
    """

    name = "checkpoint"

    def __init__(
        self,
        store: CheckpointStore,
        log: EventLog,
        *,
        rank: int,
        attempt: int,
        fence: Callable[[], None],
        facts: dict[str, Any],
    ) -> None:
        self._store = store
        self._log = log
        self._rank = rank
        self._attempt = attempt
        self._fence = fence
        self._facts = facts
        self._saved_step: int | None = None
        self._memory = HostMemory()
        self._pending: _Pending | None = None

    def on_start(self, trainer: Trainer) -> None:
        # A run that starts from a checkpoint need not save the same state again.
        self._saved_step = trainer.state.step
        # A policy that goes back needs a state to go back to from the first step on.
        if trainer.health.may_roll_back and not gather_objects(self._store.steps())[0]:
            self.save(trainer, behind=False)

    def background_done(self) -> bool:
        return self._pending is not None and self._pending.save.ready()

    def on_background_done(self, trainer: Trainer) -> None:
        self.publish(trainer)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        train = trainer.config.train
        if train.checkpoint_interval and record.step % train.checkpoint_interval == 0:
            self.save(trainer, behind=train.async_checkpoints and record.step < train.steps)

    def after_validation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        # Also where keep_best is 0: it may be raised when the run is continued.
        if self._rank == 0:
            self._store.record_score(trainer.state.step, metrics["validation_loss"])
            self._prune(trainer)

    def before_rollback(self, trainer: Trainer) -> None:
        self.publish(trainer)

    def on_rollback(self, trainer: Trainer) -> None:
        self._saved_step = trainer.state.step

    def on_common_failure(self, trainer: Trainer) -> None:
        self.publish(trainer)

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        self.publish(trainer)
        if self._saved_step != trainer.state.step:
            self.save(trainer, behind=False)
        return False

    def save(self, trainer: Trainer, behind: bool) -> None:
        """Save now, ``behind`` training's back or while it waits; an earlier save is published first."""
        self.publish(trainer)
        started = time.perf_counter()
        save = Save(
            self._store,
            step=trainer.state.step,
            attempt=self._attempt,
            rank=self._rank,
            gather=gather_objects,
            fence=self._fence,
        )
        training = {
            **self._facts,
            **trainer.state.to_dict(),
            "seed": trainer.config.run.seed,
            "schedule": dataclasses.asdict(trainer.config.optimizer.schedule),
            "optimizer_scalars": trainer.engine.scalar_state(),
            "callbacks": {callback.name: callback.state_dict() for callback in trainer.callbacks},
        }
        with PULSE.during("save"):
            if behind:
                save.start(trainer.engine.export_state(), training, self._memory)
                self._pending = _Pending(save, started, time.perf_counter() - started)
            else:
                self._record(trainer, save.write(trainer.engine.export_state(), training), started, started, 0.0)
        self._saved_step = save.step

    def publish(self, trainer: Trainer) -> None:
        """Publish the save that is under way, if any; waits for ranks that still write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        resumed = time.perf_counter()
        with PULSE.during("save"):
            self._record(trainer, pending.save.finish(), pending.started, resumed, pending.stall_s)

    def _record(self, trainer: Trainer, saved: Saved, started: float, resumed: float, stall_s: float) -> None:
        """One ``checkpoint`` event: seconds from the start to publication, and for how many of them training stood."""
        if self._rank == 0:
            self._prune(trainer)
        now = time.perf_counter()
        self._log.write(
            "checkpoint",
            step=saved.step,
            path=str(saved.path),
            seconds=round(now - started, 6),
            stall_s=round(stall_s + now - resumed, 6),
            write_s=round(saved.write_s, 6),
            bytes=saved.num_bytes,
        )

    def _prune(self, trainer: Trainer) -> None:
        train = trainer.config.train
        self._store.prune(train.keep_checkpoints, every=train.keep_every, best=train.keep_best)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save under way: when it began, and for how long training has stood still for it so far."""

    save: Save
    started: float
    stall_s: float


class SamplingCallback(Callback):
    """Text samples from ``sample_prompts`` every ``sample_interval`` steps and at the end, on rank 0 alone."""

    name = "sampling"

    def __init__(self, log: EventLog, sampler: TextSampler) -> None:
        self._log = log
        self._sampler = sampler

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        train = trainer.config.train
        if train.sample_interval and record.step % train.sample_interval == 0 and record.step != train.steps:
            self._write(trainer)

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        if trainer.config.train.sample_interval and not interrupted:
            self._write(trainer)
        return False

    def _write(self, trainer: Trainer) -> None:
        train, module = trainer.config.train, trainer.engine.module
        assert module is not None, "only an engine with a whole module samples"
        for prompt in train.sample_prompts:
            if trainer.stop.requested:
                return
            PULSE.enter("sample")
            text = self._sampler.complete(module, prompt, train.sample_tokens, seed=trainer.config.run.seed)
            self._log.write("sample", step=trainer.state.step, prompt=prompt, text=text)
