"""The training loop: one for every engine, model, objective and data source."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import psutil
import torch

from pretrain.config.schema import Config
from pretrain.engines.base import Batch, Engine
from pretrain.ops.keyed_random import keyed_seed
from pretrain.optim.schedule import learning_rate
from pretrain.parallel.process import all_reduce_floats, gather_objects, world_size
from pretrain.training.batches import SAMPLE_IDS, to_device, to_tensors
from pretrain.training.callback import Callback
from pretrain.training.signals import StopRequest
from pretrain.training.state import StepRecord, TrainState

HostBatch = dict[str, np.ndarray]


class CommonFailureError(Exception):
    """Met by every rank at the same step, so that ranks may still work together on their way out."""


class NonFiniteError(CommonFailureError, RuntimeError):
    """Loss or gradient norm is not a finite number."""


class DataEndError(CommonFailureError, ValueError):
    """The data source ends, or its global batch holds nothing to learn from."""


class DataFailureError(CommonFailureError, ValueError):
    """Data of some rank are damaged or missing."""


class DataUnavailableError(CommonFailureError, OSError):
    """Data of some rank could not be fetched; trying again later may help."""


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
        return self._objective(model, batch)


class Trainer:
    """Runs optimizer steps from ``state.step`` up to ``config.train.steps``.

    ``open_stream(first_step)`` gives this rank's micro-batches from that step on. Everything a step depends on follows
    from (configuration, seed, step), so a run continued from a checkpoint repeats an uninterrupted one.
    """

    def __init__(
        self,
        *,
        config: Config,
        engine: Engine,
        objective: Any,
        open_stream: Callable[[int], StepStream],
        state: TrainState,
        stop: StopRequest,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config = config
        self.engine = engine
        self.objective = objective
        self._loss = KeyedLoss(objective, config.run.seed)
        self.state = state
        self.callbacks = list(callbacks)
        self.host_batches: list[Batch] = []  # this rank's micro-batches of the latest step
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
            NonFiniteError: at a loss or gradient norm that is not finite; that step's weights are not saved.
        """
        interrupted = False
        stream = self._open_stream(self.state.step)
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            steps = iter(stream)
            while self.state.step < self.config.train.steps:
                record = self._step(steps)
                if record is None:
                    interrupted = True
                    break
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

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must ask at the same point."""
        return all_reduce_floats([float(self._stop.requested)])[0] > 0

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
        """This rank's micro-batches; none when its data fail, which the ranks then agree on."""
        self._data_failure = None
        try:
            return next(steps)
        except StopIteration:
            raise DataEndError(
                f"The data source ended after {self.state.samples} samples, at step {self.state.step} of "
                f"{self.config.train.steps}; lower train.steps, or use a source without end (num_samples None)"
            ) from None
        except (ValueError, OSError) as error:
            self._data_failure = error
            return []

    def _step(self, steps: Iterator[list[HostBatch]]) -> StepRecord | None:
        """One optimizer step; None when any rank was asked to stop before it."""
        started = time.perf_counter()
        host_batches = self.host_batches = [to_tensors(arrays) for arrays in self._next_arrays(steps)]
        targets = float(sum(self.objective.denominator(batch) for batch in host_batches))
        batches = [to_device(batch, self.engine.device) for batch in host_batches]
        data_s = time.perf_counter() - started

        counted = [targets, _substituted(host_batches)] if self.engine.is_data_leader else [0.0, 0.0]
        done = [float(callback.background_done()) for callback in self._background]
        asked = [float(self._stop.requested), float(self._data_failure is not None)]
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
        result = self.engine.train_step(batches, self._loss, denominator, rate)
        self._check_metric_names(result.metrics)

        memory = (
            torch.cuda.max_memory_allocated() if self.engine.device.type == "cuda" else self._process.memory_info().rss
        )
        names = sorted(result.metrics)
        reported = result.layers.values if result.layers is not None else []
        loss_sum, memory_sum, *sums = all_reduce_floats(
            [result.loss_sum, float(memory), *(result.metrics[name] for name in names), *reported]
        )
        loss = loss_sum / denominator
        if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteError(
                f"Step {self.state.step + 1}: loss {loss}, gradient norm {result.grad_norm}. Nothing of this step was "
                "saved. Resuming from the last checkpoint repeats the step exactly: to get past it, start a new run "
                "with a lower optimizer.learning_rate or train.clip_grad_norm, or look at its data, global samples "
                f"{self.state.samples}..{self.state.samples + self.config.train.global_batch_size - 1}."
            )
        metrics = {name: value / denominator for name, value in zip(names, sums[: len(names)], strict=True)}
        if result.layers is not None:
            metrics |= result.layers.metrics(sums[len(names) :])
        self.state.advance(self.config.train.global_batch_size, round(denominator))
        return StepRecord(
            step=self.state.step,
            loss=loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=round(denominator),
            metrics=metrics,
            substituted=round(substituted),
            seconds={"step": time.perf_counter() - started, "data": data_s, **result.seconds},
            memory_gib=memory_sum / 2**30,
        )


def _substituted(batches: Sequence[Batch]) -> float:
    return float(sum(int(batch[SUBSTITUTED].sum()) for batch in batches if SUBSTITUTED in batch))
