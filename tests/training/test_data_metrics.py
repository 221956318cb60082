"""Waiting for data, steps that lie ready and the source's counters, in the records that are logged."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader import StepLoader
from pretrain.training import data_metrics
from pretrain.training.data_metrics import DataMetricsCallback
from pretrain.training.state import StepRecord


class _Source:
    num_samples = None
    fingerprint = "numbers"

    def batch(self, indices: Any) -> dict[str, np.ndarray]:
        return {"tokens": np.asarray(list(indices), dtype=np.int64)[:, None]}

    def counters(self) -> dict[str, float]:
        return {"bytes": 100.0, "hits": 3, "misses": 1, "evictions": 5}


def _trainer(log_interval: int, steps: int = 100) -> Any:
    return SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(log_interval=log_interval, steps=steps)))


def _record(step: int, data_s: float) -> StepRecord:
    return StepRecord(
        step=step, loss=1.0, grad_norm=1.0, learning_rate=1.0, tokens=1, metrics={}, substituted=0,
        seconds={"step": 1.0, "data": data_s}, memory_gib=0.0,
    )  # fmt: skip


def test_the_waiting_share_counts_all_steps_since_the_record_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(data_metrics.time, "perf_counter", lambda: clock[0])
    callback = DataMetricsCallback(_Source(), lambda: 7)
    shares = {}
    for step in range(2, 11):
        clock[0] += 2.0
        record = _record(step, data_s=0.5)
        callback.after_step(_trainer(log_interval=5), record)
        shares[step] = record.metrics.get("data_wait_share")
    assert shares[5] == 0.25  # four steps of 2 s, of which 0.5 s each
    assert shares[10] == 0.25
    assert shares[6] is None
    # The sampling thread counts for itself.
    assert callback.numbers()["data_wait_share"] == 0.25
    clock[0] += 5.0
    assert callback.numbers()["data_wait_share"] == 0.0


def test_counters_appear_under_names_of_the_log() -> None:
    record = _record(5, data_s=0.1)
    DataMetricsCallback(_Source(), lambda: 7).after_step(_trainer(log_interval=5), record)
    assert record.metrics["data_ready_steps"] == 7
    assert record.metrics["data_fetched_bytes"] == 100.0
    assert record.metrics["data_cache_hits"] == 3
    assert record.metrics["data_cache_misses"] == 1
    assert "evictions" not in record.metrics


def test_a_loader_tells_how_many_steps_lie_ready() -> None:
    with StepLoader(_Source(), global_batch=4, micro_batch=4, dp_rank=0, dp_size=1, start_step=10) as loader:
        deadline = time.monotonic() + 60
        while loader.ready_steps < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ready = loader.ready_steps
        next(loader)
        assert loader.ready_steps >= ready - 1
