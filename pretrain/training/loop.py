"""The training loop: one for every engine, model, objective and data source."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import psutil
import torch

from launchers.exit_codes import ExitCode
from pretrain.config.schema import Config
from pretrain.engines.base import Batch, Engine, StepResult
from pretrain.ops.keyed_random import keyed_seed
from pretrain.optim.schedule import learning_rate
from pretrain.parallel.peak_memory import peak_bytes
from pretrain.parallel.process import all_reduce_floats, gather_objects, world_size
from pretrain.parallel.pulse import PULSE
from pretrain.training.batches import SAMPLE_IDS, to_device, to_tensors
from pretrain.training.callback import Callback
from pretrain.training.health import BadStep, Fault, HealthMonitor, window_before
from pretrain.training.signals import StopRequest, StopRequestedError
from pretrain.training.state import StepRecord, TrainState

if TYPE_CHECKING:
    from pretrain.training.rollback import Rollback

HostBatch = dict[str, np.ndarray]


class CommonFailureError(Exception):
    """Met by every rank at the same step, so that ranks may still work together on their way out."""


class BadStepError(CommonFailureError, RuntimeError):
    """The numbers of a step are bad, and the run's health policy stops it. Nothing of the step is in the state."""

    exit_code = ExitCode.NONFINITE


class NonFiniteError(BadStepError):
    """Loss or gradient norm is not a finite number."""


class LossSpikeError(BadStepError):
    """The loss stands far above that of the last steps."""


class DataEndError(CommonFailureError, ValueError):
    """The data source ends, or its global batch holds nothing to learn from."""


class DataFailureError(CommonFailureError, ValueError):
    """Data of some rank are damaged or missing."""

    exit_code = ExitCode.DATA_FAULT


class DataUnavailableError(CommonFailureError, OSError):
    """Data of some rank could not be fetched; trying again later may help."""

    exit_code = ExitCode.DATA_FAULT


SUBSTITUTED = "substituted"
"""Entry of a micro-batch (bool [B]): rows that stand in for damaged ones."""


class StepStream(Protocol):
    """Micro-batches of this rank, one list a step."""

    def __iter__(self) -> Iterator[list[HostBatch]]: ...

    def close(self) -> None: ...


def raise_common_data_failure(own: ValueError | OSError | None) -> NoReturn:
    """Raise the first rank's data failure on every rank: all end alike, and can still save together.

    Collective; ``own`` is this rank's failure, and some rank has one.
    """
    told = None if own is None else (isinstance(own, OSError), str(own))
    is_fetch, text = next(told for told in gather_objects(told) if told is not None)
    raise (DataUnavailableError if is_fetch else DataFailureError)(text) from own


class KeyedLoss:
    """The objective, with torch's generators keyed by (seed, first global sample of the micro-batch).

    So a model that draws from them (dropout) repeats its draws when a run is continued, on any number of ranks.
    """

    def __init__(self, objective: Any, seed: int) -> None:
        self._objective = objective
        self._seed = seed
        self.vocabulary_parallel = getattr(objective, "vocabulary_parallel", False)

    def __call__(self, model: Callable[..., torch.Tensor], batch: Batch) -> Any:
        torch.manual_seed(keyed_seed(self._seed, "training", int(batch[SAMPLE_IDS][0])))
        PULSE.enter("forward")
        try:
            return self._objective(model, batch)
        finally:  # a pipeline stage without a head leaves by an exception
            PULSE.enter("backward")


class Trainer:
    """Runs optimizer steps from ``state.step`` up to ``config.train.steps``.

    ``open_stream(first, skipped)`` gives this rank's micro-batches of batch ``first`` and those that follow, without
    the batches ``skipped``. Everything a step depends on follows from (configuration, seed, step, skipped batches), so
    a run continued from a checkpoint repeats an uninterrupted one.

    ``health`` judges steps (default: by ``config.health``); ``rollback`` is needed where its policy goes back.
    """

    def __init__(
        self,
        *,
        config: Config,
        engine: Engine,
        objective: Any,
        open_stream: Callable[[int, frozenset[int]], StepStream],
        state: TrainState,
        stop: StopRequest,
        callbacks: Sequence[Callback],
        health: HealthMonitor | None = None,
        rollback: Rollback | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.objective = objective
        self._loss = KeyedLoss(objective, config.run.seed)
        self.state = state
        self.callbacks = list(callbacks)
        self.host_batches: list[Batch] = []  # this rank's micro-batches of the latest step
        self.health = health or HealthMonitor(config.health)
        self._rollback = rollback
        self._went_back_to: int | None = None
        self._open_stream = open_stream
        self._stop = stop
        # Ranks need not have the same callbacks (rank 0 alone samples), but those that work in the background they do.
        self._background = [c for c in callbacks if type(c).background_done is not Callback.background_done]
        self._background_done: list[Callback] = []
        self._metric_names: list[str] | None = None
        self._data_failure: ValueError | OSError | None = None
        self._process = psutil.Process(os.getpid())

    def run(self) -> bool:
        """Train; returns True when stopped by request before the last step.

        Raises:
            BadStepError: at a step whose loss or gradient norm is not finite, or whose loss is a spike, where the
                health policy says so; its update was not made.
        """
        interrupted = False
        PULSE.step = self.state.step
        stream = self._stream()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            steps = iter(stream)
            while self.state.step < self.config.train.steps:
                record = self._step(steps)
                if record is None:
                    interrupted = True
                    break
                if isinstance(record, Fault):
                    # Closed first: sources may then be asked where the batch came from.
                    stream.close()
                    self._recover(record)
                    stream = self._stream()
                    steps = iter(stream)
                    continue
                for callback in self._background_done:
                    callback.on_background_done(self)
                for callback in self.callbacks:
                    callback.after_step(self, record)
            for callback in self.callbacks:
                interrupted |= callback.on_end(self, interrupted)
        except CommonFailureError:
            for callback in self.callbacks:
                callback.on_common_failure(self)
            raise
        finally:
            stream.close()
        return interrupted

    @property
    def stop(self) -> StopRequest:
        """This rank's own stop request; the others need not have one yet."""
        return self._stop

    def _stream(self) -> StepStream:
        first = self.state.next_batch(self.config.train.global_batch_size)
        return self._open_stream(first, frozenset(self.state.skipped))

    def _recover(self, fault: Fault) -> None:
        """Act on a step whose update was dropped: raise, or leave a state from which training goes on. Collective."""
        global_batch = self.config.train.global_batch_size
        batch = self.state.next_batch(global_batch)
        action, skipped, plan, reason = fault.action, [batch], None, None
        if action != "stop" and self.health.is_exhausted:
            action, reason = "stop", f"the run has had {self.health.num_events} bad steps (health.max_events)"
        if action == "rollback":
            assert self._rollback is not None, "a policy that goes back comes with a rollback"
            for callback in self.callbacks:
                callback.before_rollback(self)
            window = window_before(batch, self.health.config.skip_window, set(self.state.skipped))
            # No step went well from there: the fault may lie in the checkpoint.
            doubtful = self.state.step if self.state.step == self._went_back_to else None
            plan = self._rollback.plan(window, global_batch, doubtful)
            if plan is None:
                action, reason = "stop", "no intact checkpoint before it is left to go back to"
            else:
                skipped = plan.skipped
        bad = BadStep(
            step=self.state.step + 1,
            batch=batch,
            first_sample=batch * global_batch,
            num_samples=global_batch,
            fault=fault,
            action=action,
            skipped=[] if action == "stop" else skipped,
            skipped_before=list(self.state.skipped),
            to_step=plan.step if plan is not None else None,
            reason=reason,
        )
        self.health.num_events += 1
        for callback in self.callbacks:
            callback.on_bad_step(self, bad)
        if action == "stop":
            raise (NonFiniteError if fault.kind == "nonfinite" else LossSpikeError)(_why_stopped(bad))
        self.state.skip(bad.skipped)
        if plan is not None and self._rollback is not None:
            self._rollback.carry_out(self, plan)
            self._went_back_to = plan.step
            for callback in self.callbacks:
                callback.on_rollback(self)

    def _check_metric_names(self, metrics: dict[str, float]) -> None:
        """Once: sums over ranks need the same metrics on all of them."""
        if self._metric_names is None:
            self._metric_names = sorted(metrics)
            named = gather_objects(self._metric_names)
            if any(names != self._metric_names for names in named):
                raise ValueError(
                    f"The objective reports other metrics on other ranks: {named}; report the same names always"
                )

    def _next_arrays(self, steps: Iterator[list[HostBatch]]) -> list[HostBatch]:
        """This rank's micro-batches; none when its data fail or a stop cuts the wait, on which ranks then agree."""
        self._data_failure = None
        PULSE.enter("data")
        try:
            return next(steps)
        except StopRequestedError:
            return []
        except StopIteration:
            raise DataEndError(
                f"The data source ended after {self.state.samples} samples, at step {self.state.step} of "
                f"{self.config.train.steps}; lower train.steps, or use a source without end (num_samples None)"
                + (f". {len(self.state.skipped)} batches were skipped as bad" if self.state.skipped else "")
            ) from None
        except (ValueError, OSError) as error:
            self._data_failure = error
            return []

    def _step(self, steps: Iterator[list[HostBatch]]) -> StepRecord | Fault | None:
        """One optimizer step; a fault when its update was dropped, None when any rank was asked to stop before it."""
        started = time.perf_counter()
        host_batches = self.host_batches = [to_tensors(arrays) for arrays in self._next_arrays(steps)]
        targets = float(sum(self.objective.denominator(batch) for batch in host_batches))
        batches = [to_device(batch, self.engine.device) for batch in host_batches]
        data_s = time.perf_counter() - started

        counted = [targets, _substituted(host_batches)] if self.engine.is_data_leader else [0.0, 0.0]
        done = [float(callback.background_done()) for callback in self._background]
        asked = [float(self._stop.requested), float(self._data_failure is not None)]
        PULSE.enter("all-reduce")
        denominator, substituted, stops, failures, *done = all_reduce_floats([*counted, *asked, *done])
        if failures:
            raise_common_data_failure(self._data_failure)
        if stops:
            return None
        self._background_done = [
            callback for callback, ranks in zip(self._background, done, strict=True) if ranks == world_size()
        ]
        if denominator <= 0:
            raise DataEndError(
                f"Step {self.state.step + 1}: the global batch holds no target token; check the data set's loss mask"
            )
        rate = learning_rate(self.config.optimizer.schedule, self.config.optimizer.learning_rate, self.state.step)
        sums: _GlobalSums | None = None

        def accept(result: StepResult) -> bool:
            nonlocal sums
            sums = self._add_up(result, denominator)
            return sums.fault is None

        result = self.engine.train_step(batches, self._loss, denominator, rate, accept)
        assert sums is not None, "the engine asks before it updates"
        if sums.fault is not None:
            return sums.fault
        self.health.passed(sums.loss)
        self.state.advance(self.config.train.global_batch_size, round(denominator))
        PULSE.completed(self.state.step)
        return StepRecord(
            step=self.state.step,
            loss=sums.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=round(denominator),
            metrics=sums.metrics,
            substituted=round(substituted),
            seconds={"step": time.perf_counter() - started, "data": data_s, **result.seconds},
            memory_gib=sums.memory_gib,
        )

    def _add_up(self, result: StepResult, denominator: float) -> _GlobalSums:
        """Sums over all ranks of what a step reports, and the judgement of them. Collective, before the update."""
        self._check_metric_names(result.metrics)
        memory = (
            peak_bytes(self.engine.device) if self.engine.device.type == "cuda" else self._process.memory_info().rss
        )
        PULSE.enter("all-reduce")
        names = sorted(result.metrics)
        reported = result.layers.values if result.layers is not None else []
        own_fault = float(not math.isfinite(result.grad_norm))  # summed, so that no rank can be of another mind
        loss_sum, memory_sum, faults, *sums = all_reduce_floats(
            [result.loss_sum, float(memory), own_fault, *(result.metrics[name] for name in names), *reported]
        )
        loss = loss_sum / denominator
        fault = self.health.judge(loss, math.nan if faults and not own_fault else result.grad_norm)
        metrics = {name: value / denominator for name, value in zip(names, sums[: len(names)], strict=True)}
        if result.layers is not None and fault is None:
            metrics |= result.layers.metrics(sums[len(names) :])
        PULSE.enter("optimizer")
        return _GlobalSums(loss, metrics, memory_sum / 2**30, fault)


@dataclass(frozen=True)
class _GlobalSums:
    """What all ranks together report of a step: mean loss, metrics, memory; and what is wrong with it."""

    loss: float
    metrics: dict[str, float]
    memory_gib: float
    fault: Fault | None


def _why_stopped(bad: BadStep) -> str:
    last = bad.first_sample + bad.num_samples - 1
    because = f" It stops because {bad.reason}." if bad.reason else ""
    return (
        f"Step {bad.step}: {bad.fault.describe()}. Nothing of this step was saved.{because} Resuming from the last "
        f"checkpoint repeats the step exactly. Look at its data, global samples {bad.first_sample}..{last}, with "
        f"`pretrain replay RUN --step {bad.step}`. To get past it, resume with health.on_{bad.fault.kind}=skip or "
        "=rollback, or start a new run with a lower optimizer.learning_rate or train.clip_grad_norm."
    )


def _substituted(batches: Sequence[Batch]) -> float:
    return float(sum(int(batch[SUBSTITUTED].sum()) for batch in batches if SUBSTITUTED in batch))
