"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pretrain.engines.base import Engine
from pretrain.parallel.process import all_reduce_floats
from pretrain.training.batches import to_device, to_tensors
from pretrain.training.loop import raise_common_data_failure

_STOP_INTERVAL = 8  # batches between two questions whether to stop


def evaluate(
    engine: Engine,
    objective: Any,
    source: Any,
    *,
    batch_size: int,
    num_samples: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss (nats per target token) over ``num_samples`` samples spread evenly over a finite source (None: all).

    Samples are dealt to data-parallel indices in turn and sums are taken in float64. Over the whole source the result
    also holds bits per UTF-8 byte: total nats / ln 2 / bytes of the text behind the targets. ``stop``, which must
    answer the same on every rank, is asked every few batches; when it says yes the result is None.

    Raises:
        DataFailureError, DataUnavailableError: on every rank, when the data of one fail.
    """
    total = source.num_samples if num_samples is None else min(num_samples, source.num_samples)
    loss_sum = targets = 0.0
    for number, (first, rows) in enumerate(_rounds(total, batch_size, engine.dp_size)):
        if number % _STOP_INTERVAL == 0 and stop():
            return None
        places = [first + engine.dp_rank + row * engine.dp_size for row in range(rows)]
        is_counted = places[-1] < total
        # Evaluation is collective: a rank that is left without a sample repeats one, which does not count.
        indices = [place * source.num_samples // total for place in (places if is_counted else [first])]
        arrays: dict[str, np.ndarray] = {}
        failure: ValueError | OSError | None = None
        try:
            arrays = source.batch(indices)
        except (ValueError, OSError) as error:
            failure = error
        # A rank that left alone would leave the others waiting for it.
        if all_reduce_floats([float(failure is not None)])[0]:
            raise_common_data_failure(failure)
        batch = to_tensors(arrays | {"sample_ids": np.array(indices, dtype=np.int64)})
        loss = engine.eval_step(to_device(batch, engine.device), objective)
        if is_counted and engine.is_data_leader:
            loss_sum += loss
            targets += float(objective.denominator(batch))
    loss_sum, targets = all_reduce_floats([loss_sum, targets])
    metrics = {"validation_loss": loss_sum / max(targets, 1.0)}
    if total == source.num_samples and getattr(source, "num_bytes", None):
        metrics["validation_bits_per_byte"] = loss_sum / math.log(2) / source.num_bytes
    return metrics


def _rounds(total: int, batch_size: int, dp_size: int) -> Iterator[tuple[int, int]]:
    """(first place, rows) of each round: every data-parallel index evaluates ``rows`` samples, ``dp_size`` apart.

    Only the last round, of one row, may reach beyond ``total`` places. So all ranks make the same calls with batches of
    the same size, no sample is evaluated as a row that does not count, and any objective can be summed.
    """
    full, rest = divmod(total, batch_size * dp_size)
    for number in range(full):
        yield number * batch_size * dp_size, batch_size
    rows, single = divmod(rest, dp_size)
    if rows:
        yield total - rest, rows
    if single:
        yield total - single, 1
