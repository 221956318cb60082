"""Validation: loss, perplexity, bits per byte and what the objective adds, of the whole split and by its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from data_pipeline.source import SourcePart
from pretrain.engines.base import Engine
from pretrain.parallel.process import all_reduce_floats, gather_objects
from pretrain.parallel.pulse import PULSE
from pretrain.training.batches import to_device, to_tensors
from pretrain.training.loop import raise_common_data_failure
from pretrain.training.signals import StopRequest, StopRequestedError


@dataclass
class Sums:
    """Sums over samples: of the loss (nats), of the target tokens, and of the objective's further metrics."""

    loss: float = 0.0
    targets: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, targets: float, metrics: dict[str, float]) -> None:
        """Take in another batch or another rank."""
        self.loss += loss
        self.targets += targets
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


def evaluate(
    engine: Engine,
    objective: Any,
    source: Any,
    *,
    batch_size: int,
    num_samples: int | None = None,
    stop: StopRequest | None = None,
) -> dict[str, float] | None:
    """Means per target token over ``num_samples`` samples spread evenly over a finite source (None: all).

    Samples are dealt to data-parallel indices in turn and sums are taken in float64. ``validation_loss`` (nats) comes
    with ``validation_<name>`` for each metric of the objective. Where the objective declares ``likelihood``, the
    exponential of the loss is ``validation_perplexity``. Over the whole source, ``validation_bits_per_byte`` is
    total nats / ln 2 / UTF-8 bytes of the text behind the targets. Of each of several parts of the source (its
    attribute ``parts``) the same figures are named ``validation/<part>/loss`` and so on. When any rank's ``stop`` is
    requested, also while it waits for data, the result is None on every rank.

    Raises:
        DataFailureError, DataUnavailableError: on every rank, when the data of one fail.
    """
    count = source.num_samples
    total = count if num_samples is None else min(num_samples, count)
    num_bytes = getattr(source, "num_bytes", None)
    parts: Sequence[SourcePart] = getattr(source, "parts", None) or [SourcePart("all", count, num_bytes)]
    # Place p stands for sample p * count // total, so the places of a part are a range, too.
    bounds = [-(-end * total // count) for end in accumulate((part.num_samples for part in parts), initial=0)]
    own = [Sums() for _ in parts]
    for sums, (begin, end) in zip(own, pairwise(bounds), strict=True):
        for first, rows in _rounds(end - begin, batch_size, engine.dp_size):
            PULSE.tick()
            places = [begin + first + engine.dp_rank + row * engine.dp_size for row in range(rows)]
            is_counted = places[-1] < end
            # Evaluation is collective: a rank that is left without a sample repeats one, which does not count.
            indices = [place * count // total for place in (places if is_counted else [begin + first])]
            batch = _fetch(source, indices, stop)
            if batch is None:
                return None
            result = engine.eval_step(to_device(batch, engine.device), objective)
            if is_counted and engine.is_data_leader:
                sums.add(result.loss_sum, float(objective.denominator(batch)), result.metrics)
    # Gathered, not reduced: a rank without samples of its own knows no names of metrics.
    totals = [Sums() for _ in parts]
    for ranks in gather_objects([(sums.loss, sums.targets, sums.metrics) for sums in own]):
        for sums, of_rank in zip(totals, ranks, strict=True):
            sums.add(*of_rank)
    whole = Sums()
    for sums in totals:
        whole.add(sums.loss, sums.targets, sums.metrics)
    is_all, likelihood = total == count, bool(getattr(objective, "likelihood", False))
    figures = _figures(whole, num_bytes if is_all else None, likelihood)
    metrics = {f"validation_{name}": value for name, value in figures}
    for part, sums, (begin, end) in zip(parts, totals, pairwise(bounds), strict=True):
        if len(parts) > 1 and begin < end:
            found = _figures(sums, part.num_bytes if is_all else None, likelihood)
            metrics |= {f"validation/{part.name}/{name}": value for name, value in found}
    return metrics


def _fetch(source: Any, indices: list[int], stop: StopRequest | None) -> dict[str, Any] | None:
    """The samples as host tensors; raises on every rank when the data of one fail, None when one was asked to stop."""
    arrays: dict[str, np.ndarray] = {}
    failure: ValueError | OSError | None = None
    try:
        arrays = source.batch(indices) if stop is None else stop.while_waiting(lambda: source.batch(indices))
    except StopRequestedError:
        pass
    except (ValueError, OSError) as error:
        failure = error
    # A rank that left alone would leave the others waiting for it.
    failures, stops = all_reduce_floats([float(failure is not None), float(stop is not None and stop.requested)])
    if failures:
        raise_common_data_failure(failure)
    if stops:
        return None
    return to_tensors(arrays | {"sample_ids": np.array(indices, dtype=np.int64)})


def _figures(sums: Sums, num_bytes: int | None, likelihood: bool) -> Iterator[tuple[str, float]]:
    """Names and values of what is reported of some samples."""
    targets = max(sums.targets, 1.0)
    loss = sums.loss / targets
    yield "loss", loss
    if likelihood:
        yield "perplexity", math.exp(loss) if loss < 700 else math.inf
    if num_bytes:
        yield "bits_per_byte", sums.loss / math.log(2) / num_bytes
    for name, value in sorted(sums.metrics.items()):
        yield name, value / targets


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
