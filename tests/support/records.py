"""Records of a run as a rank writes them."""

from __future__ import annotations

from pathlib import Path

from pretrain.tracking.metrics_log import MetricsLog


def write_steps(path: Path, attempt: int, first: int, last: int) -> None:
    with MetricsLog(path / "metrics.jsonl", attempt) as log:
        log.write("start", first, steps=last, world_size=2)
        for step in range(first + 1, last + 1):
            log.write("train", step, metrics={"loss": 5.0 / step, "learning_rate": 1e-3})
        log.write("eval", last, metrics={"validation_loss": 2.5, "validation_bits_per_byte": 1.25})
