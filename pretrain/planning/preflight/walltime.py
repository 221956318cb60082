"""Concern: how long the run takes, and how many jobs of the time limit that makes. Torch-free.

Measured, or not said at all: seconds per step come from an earlier attempt of the run, or from a run below ``run.root``
with the same model and layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.durations import parse_duration
from pretrain.planning.preflight.findings import Finding, error, ok, unknown, warning
from pretrain.planning.preflight.pace import Pace, pace_of, pace_of_equal_run
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import amount, duration


def check(subject: Subject) -> Iterator[Finding]:
    """Time of the steps that are left, and whether the jobs that takes are allowed for."""
    train = subject.config.train
    done = _steps_done(subject)
    left = max(train.steps - done, 0)
    if not left:
        yield ok("steps", f"all {train.steps:,} are done")
        return
    pace = _pace(subject)
    if pace is None:
        where = subject.config.run.root
        yield unknown(
            "duration",
            f"no earlier attempt, and no run below {where} with this model and layout, has measured the time of a step",
            "a few steps tell: train.steps=20 in a run of their own",
        )
        return
    seconds, shown = needed_s(subject, pace, left)
    length = subject.sequence_length
    tokens = left * train.global_batch_size * (length or 0)
    rate = f", {amount(tokens / seconds)} tokens/s" if tokens else ""
    text = f"{duration(seconds)} for {left:,} steps: {shown}{rate}; measured over {pace.steps} steps of {pace.source}"
    if subject.slurm is None:
        yield ok("duration", text, seconds=seconds, step_s=pace.step_s)
        return
    yield from _jobs(subject, pace, seconds, text)


def _jobs(subject: Subject, pace: Pace, seconds: float, text: str) -> Iterator[Finding]:
    launcher, lifecycle = subject.slurm, subject.config.lifecycle
    assert launcher is not None
    limit = parse_duration(launcher.time_limit)
    if limit is None:
        yield unknown("duration", f"{text}; launcher.time_limit={launcher.time_limit} is no length of time")
        return
    saving = lifecycle.save_margin * (pace.save_s if pace.save_s is not None else lifecycle.first_save_s)
    lost = (pace.startup_s or 0.0) + saving + pace.step_s
    usable = limit - lost
    start = duration(pace.startup_s) if pace.startup_s is not None else "an unknown time"
    spent = f"{start} to start, {duration(saving)} kept for the last checkpoint"
    if usable < pace.step_s:
        yield error(
            "launcher.time_limit",
            f"{launcher.time_limit} ({duration(limit)}), of which {spent}",
            f"room for steps of {duration(pace.step_s)}: a job would end before its first",
            "a longer launcher.time_limit, or a smaller lifecycle.save_margin",
        )
        return
    jobs = math.ceil(seconds / usable)
    figures = {"seconds": seconds, "step_s": pace.step_s, "jobs": jobs}
    whole = f"{text}; {jobs} job{'s' if jobs != 1 else ''} of {launcher.time_limit}, each with {spent}"
    yield ok("duration", whole, **figures)
    if jobs > 1 and lifecycle.on_time_limit == "stop":
        yield warning(
            "lifecycle.on_time_limit",
            f"stop, though the run takes about {jobs} jobs",
            "an action that goes on",
            "lifecycle.on_time_limit=requeue, or a longer launcher.time_limit",
            **figures,
        )
    elif jobs > 1 and launcher.max_restarts == 0:
        yield warning(
            "launcher.max_restarts",
            f"0, though the run takes about {jobs} jobs",
            "at least 1: with 0 no job follows another by itself",
            "launcher.max_restarts=20, or a longer launcher.time_limit",
            **figures,
        )


def needed_s(subject: Subject, pace: Pace, left: int) -> tuple[float, str]:
    """Seconds for ``left`` steps with validations and checkpoints, and how they come about."""
    train = subject.config.train
    total = left * pace.step_s
    parts = [f"{duration(pace.step_s)} each"]
    for count, each, name in (
        (left // train.eval_interval if train.eval_interval else 0, pace.eval_s, "validations"),
        (left // train.checkpoint_interval if train.checkpoint_interval else 0, pace.stall_s, "checkpoints"),
    ):
        if count and each is not None:
            total += count * each
            parts.append(f"{count:,} {name} of {duration(each)}")
        elif count:
            parts.append(f"{count:,} {name} of unknown length")
    return total, ", ".join(parts)


def _pace(subject: Subject) -> Pace | None:
    if subject.run is not None:
        from pretrain.planning.preflight.pace import signature

        # On another layout than before its own past says nothing.
        if signature(subject.run.config()) == signature(subject.tree) and (own := pace_of(subject.run.path)):
            return own
        return pace_of_equal_run(subject.tree, subject.run.path.parent)
    return pace_of_equal_run(subject.tree, Path(subject.config.run.root))


def _steps_done(subject: Subject) -> int:
    """Of a run that continues, those of its newest checkpoint: later ones are trained again."""
    if subject.run is None:
        return 0
    return max(CheckpointStore(subject.run.checkpoints_path).steps(), default=0)
