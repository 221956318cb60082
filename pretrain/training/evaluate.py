"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pretrain.engines.base import Engine
from pretrain.parallel.process import all_reduce_floats
from pretrain.training.batches import to_device, to_tensors

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

    Samples are dealt to data-parallel ranks in turn and sums are taken in float64. Over the whole source the result
    also holds bits per UTF-8 byte: total nats / ln 2 / bytes of the text behind the targets. ``stop``, which must
    answer the same on every rank, is asked every few batches; when it says yes the result is None.
    """
    total = source.num_samples if num_samples is None else min(num_samples, source.num_samples)
    mine = [place * source.num_samples // total for place in range(engine.dp_rank, total, engine.dp_size)]
    loss_sum = targets = 0.0
    # The same number of rounds on every rank, so that all ask ``stop`` together; in the last some may have no sample.
    most = math.ceil(total / engine.dp_size)
    for number, start in enumerate(range(0, most, batch_size)):
        if number % _STOP_INTERVAL == 0 and stop():
            return None
        if start >= len(mine):
            continue
        indices = mine[start : start + batch_size]
        batch = to_tensors(source.batch(indices) | {"sample_ids": np.array(indices, dtype=np.int64)})
        targets += float(objective.denominator(batch))
        loss_sum += engine.eval_step(to_device(batch, engine.device), objective)
    loss_sum, targets = all_reduce_floats([loss_sum, targets])
    metrics = {"validation_loss": loss_sum / max(targets, 1.0)}
    if total == source.num_samples and getattr(source, "num_bytes", None):
        metrics["validation_bits_per_byte"] = loss_sum / math.log(2) / source.num_bytes
    return metrics
