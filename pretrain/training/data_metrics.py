"""How delivery of data keeps up: waiting, steps that lie ready, what was fetched and what the cache had."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pretrain.training.callback import Callback
from pretrain.training.loop import Trainer
from pretrain.training.state import StepRecord

# Counters of a source under the names of the log. Others exist; these tell slow storage from a cold cache.
_COUNTERS = {
    "bytes": "data_fetched_bytes",
    "retries": "data_fetch_retries",
    "hits": "data_cache_hits",
    "misses": "data_cache_misses",
    "wait_s": "data_fetch_wait_s",
}


class DataMetricsCallback(Callback):
    """Adds to the records that are logged: ``data_wait_share``, the share of the time since the record before for
    which this rank waited for its batches; ``data_ready_steps``, steps prefetched and not yet used; sums of the
    source's counters since its start. Register it before the callback that logs.

    ``ready`` tells how many steps lie ready, ``source`` may have ``counters()``. Rank 0's numbers are logged; every
    node's first rank has its own in the samples of its node (:meth:`numbers`).
    """

    name = "data_metrics"

    def __init__(self, source: Any, ready: Callable[[], int]) -> None:
        self._source = source
        self._ready = ready
        self._waited = 0.0
        self._logged = (0.0, time.perf_counter())
        self._sampled = (0.0, time.perf_counter())

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._waited += record.seconds["data"]
        train = trainer.config.train
        if not train.log_interval or (record.step % train.log_interval and record.step not in (1, train.steps)):
            return
        waited, now = self._waited, time.perf_counter()
        record.metrics["data_wait_share"] = _share(self._logged, waited, now)
        self._logged = (waited, now)
        record.metrics.update(self._counts())

    def numbers(self) -> dict[str, float]:
        """The same, from the sampling thread; its waiting share counts since its own call before."""
        waited, now = self._waited, time.perf_counter()
        share = _share(self._sampled, waited, now)
        self._sampled = (waited, now)
        return {"data_wait_share": share, **self._counts()}

    def _counts(self) -> dict[str, float]:
        counters = self._source.counters() if hasattr(self._source, "counters") else {}
        named = {name: float(counters[own]) for own, name in _COUNTERS.items() if own in counters}
        return {"data_ready_steps": float(self._ready()), **named}


def _share(before: tuple[float, float], waited: float, now: float) -> float:
    return round(min(1.0, (waited - before[0]) / max(now - before[1], 1e-9)), 4)
