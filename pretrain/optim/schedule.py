"""Learning-rate schedules as pure functions of the step. Torch-free."""

from __future__ import annotations

import math

from pretrain.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Learning rate of 0-based optimizer step ``step``.

    Linear warm-up reaches ``peak`` at step ``warmup_steps - 1``; then the decay runs to ``final_ratio * peak`` at the
    last step before ``horizon`` and stays there. Cosine as in SGDR without restarts (arXiv 1608.03983, equation 5).
    """
    assert schedule.horizon is not None, "the horizon is set when the run is frozen"
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = max(1, schedule.horizon - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * shape)
