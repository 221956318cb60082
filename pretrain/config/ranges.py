"""Ranges of every number of the schema. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pretrain.config.violation import Violation


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``None`` means unbounded on that side."""

    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    is_high_open: bool = False

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = self.low is None or (value > self.low if self.is_low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.is_high_open else value <= self.high)
        return above and below

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'greater than' if self.is_low_open else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"{'less than' if self.is_high_open else 'at most'} {self.high:g}"
        return " and ".join(side for side in (low, high) if side)


POSITIVE_COUNT: Final = Range(low=1)
COUNT: Final = Range(low=0)
POSITIVE: Final = Range(low=0, is_low_open=True)
BETA: Final = Range(low=0, high=1, is_high_open=True)
SHARE: Final = Range(low=0, high=1)
MOST_THREADS: Final = max(64, 4 * (os.cpu_count() or 1))
"""Of one pool; more would only wait for each other, and the system may start no more."""

RANGES: Final[dict[str, Range]] = {
    "run.seed": COUNT,
    "train.steps": POSITIVE_COUNT,
    "train.global_batch_size": POSITIVE_COUNT,
    "train.micro_batch_size": POSITIVE_COUNT,
    "train.clip_grad_norm": POSITIVE,
    "train.log_interval": COUNT,
    "train.eval_interval": COUNT,
    "train.eval_samples": POSITIVE_COUNT,
    "train.checkpoint_interval": COUNT,
    "train.keep_checkpoints": POSITIVE_COUNT,
    "train.keep_every": COUNT,
    "train.keep_best": COUNT,
    "train.sample_interval": COUNT,
    "train.sample_tokens": POSITIVE_COUNT,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.momentum": BETA,
    "optimizer.newton_schulz_steps": Range(low=1, high=20),
    "optimizer.betas[0]": BETA,
    "optimizer.betas[1]": BETA,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": COUNT,
    "optimizer.schedule.warmup_steps": COUNT,
    "optimizer.schedule.horizon": POSITIVE_COUNT,
    "optimizer.schedule.final_ratio": SHARE,
    "optimizer.offload.fraction": SHARE,
    "optimizer.offload.resident_fraction": SHARE,
    "optimizer.offload.subgroup_size": POSITIVE_COUNT,
    "optimizer.offload.host_memory_gib": POSITIVE,
    "optimizer.offload.cpu_threads": Range(low=1, high=MOST_THREADS),
    "optimizer.offload.replan_interval": COUNT,
    "optimizer.offload.timeline_interval": COUNT,
    "engine.reduce_bucket_size": POSITIVE_COUNT,
    "engine.allgather_bucket_size": POSITIVE_COUNT,
    "engine.prefetch_bucket_size": COUNT,
    "engine.persistence_threshold": COUNT,
    "engine.tensor_parallel": POSITIVE_COUNT,
    "engine.pipeline_parallel": POSITIVE_COUNT,
    "engine.virtual_pipeline": POSITIVE_COUNT,
    "engine.bucket_size": POSITIVE_COUNT,
    "launcher.num_processes": POSITIVE_COUNT,
    "launcher.threads_per_process": POSITIVE_COUNT,
    "launcher.shutdown_grace_s": POSITIVE,
    "launcher.max_restarts": COUNT,
    "launcher.num_nodes": POSITIVE_COUNT,
    "launcher.min_nodes": POSITIVE_COUNT,
    "lifecycle.max_repeats": POSITIVE_COUNT,
    "lifecycle.heartbeat_interval_s": POSITIVE,
    "lifecycle.hang_timeout_s": POSITIVE,
    "lifecycle.startup_timeout_s": POSITIVE,
    "lifecycle.save_margin": Range(low=1),
    "lifecycle.first_save_s": POSITIVE,
    "health.spike_zscore": POSITIVE,
    "health.spike_window": Range(low=8),
    "health.skip_window": POSITIVE_COUNT,
    "health.max_events": COUNT,
    "tracking.flush_interval_s": POSITIVE,
    "tracking.request_timeout_s": POSITIVE,
    "tracking.close_timeout_s": POSITIVE,
    "tracking.system_metrics_interval_s": Range(low=0),
}
"""Keyed by path. ``engine.zero_stage`` is judged by its engine, which gives the reason."""


def out_of_range(sound: Mapping[str, Any]) -> Iterator[Violation]:
    """A violation for each number outside its range; ``sound`` maps paths to typed values."""
    for path, allowed in RANGES.items():
        value = sound.get(path)
        # A word that stands for a number, such as auto, has passed its type check.
        if value is not None and not isinstance(value, str) and not allowed.holds(value):
            yield Violation(path, value, f"must be {allowed}", f"give a number {allowed}")
