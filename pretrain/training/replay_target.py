"""Which batch a step of a run was made on, and from which checkpoint that step can be reached again. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launchers.run_dir import RunDir
from pretrain.checkpoint.manifest import CorruptCheckpointError, Manifest
from pretrain.checkpoint.store import CheckpointStore
from pretrain.tracking.metrics_log import effective_records, read_records
from pretrain.training.health_records import read_events


class ReplayError(ValueError):
    """The step cannot be replayed."""


@dataclass(frozen=True)
class ReplayTarget:
    """Step ``step`` on batch ``batch``, with ``skipped`` left out before it.

    ``event`` is the bad step on record, None for one that was made; ``loss`` and ``grad_norm`` are those on record
    (None: the step was not logged). ``checkpoint`` None stands for the initial weights. ``attempt`` made or tried the
    step (None: not on record), with the settings of ``revision``; ``other_revisions`` are those of the steps since the
    checkpoint, where others. ``seconds`` is what a step took, None when that is not on record.
    """

    step: int
    batch: int
    skipped: list[int]
    event: dict[str, Any] | None
    loss: float | None
    grad_norm: float | None
    checkpoint: Path | None
    checkpoint_step: int
    attempt: int | None = None
    revision: int = 0
    other_revisions: list[int] = field(default_factory=list)
    seconds: float | None = None


def replay_target(run: RunDir, global_batch: int, step: int, batch: int | None = None) -> ReplayTarget:
    """The target for ``step``: the last bad batch at that step, else the batch that the step was made on.

    ``batch`` chooses among the batches that were tried at the step.

    Raises:
        ReplayError: there was no such step, or no such batch at it.
    """
    events = read_events(run.health_path)
    written = read_records(run.metrics_path) if run.metrics_path.is_file() else []
    records = effective_records(written)
    # A bad step was not made; the history keeps it also where the run went back behind it.
    steps = [record["step"] for record in records if record.get("step") is not None and record["event"] != "health"]
    made = max(steps, default=0)
    here = [event for event in events if event["step"] == step]
    if step < 1 or (step > made and not here):
        raise ReplayError(f"--step {step}: {run.path} has made {made} steps; give a step from 1 to {max(made, 1)}")
    skipped = sorted({number for event in events for number in event["skipped"]})
    trained = batch_of_step(step, skipped)
    tried = [event["batch"] for event in here]
    if step <= made and trained not in tried:
        tried.append(trained)
    if batch is not None and batch not in tried:
        raise ReplayError(f"--batch {batch}: batches tried at step {step} are {', '.join(map(str, tried))}")
    chosen = batch if batch is not None else (here[-1]["batch"] if here else trained)
    event = next((event for event in reversed(here) if event["batch"] == chosen), None)
    if event is not None:
        skipped = event["skipped_before"]
        metrics: dict[str, float] = {name: float(event[name]) for name in ("loss", "grad_norm")}
    else:
        metrics = next((r["metrics"] for r in records if r["event"] == "train" and r["step"] == step), {})
    folder, reached = _nearest(CheckpointStore(run.checkpoints_path), step, skipped, global_batch)
    starts = _starts(run, written)
    attempt, revision = _maker(starts, step)
    if event is not None:
        attempt = event.get("attempt", attempt)
        revision = next((start.revision for start in starts if start.attempt == attempt), revision)
    if revision is None:
        revision = run.revision()
    others = {_maker(starts, between)[1] for between in range(reached + 1, step)} - {revision, None}
    return ReplayTarget(
        step,
        chosen,
        skipped,
        event,
        metrics.get("loss"),
        metrics.get("grad_norm"),
        folder,
        reached,
        attempt,
        revision,
        sorted(number for number in others if number is not None),
        _seconds(records),
    )


@dataclass(frozen=True)
class _Start:
    """An attempt that began to train from ``step``, or went back to it, with the settings of ``revision``."""

    attempt: int
    step: int
    revision: int


def _starts(run: RunDir, records: list[dict[str, Any]]) -> list[_Start]:
    """All starts on record, in order. One that does not name its revision had the newest that was there by then."""
    dates = [(_written(run, number), number) for number in range(1, run.revision() + 1)]
    found = []
    for record in records:
        if record["event"] == "start" and record.get("step") is not None:
            revision = record.get("revision")
            if revision is None:
                revision = max((number for date, number in dates if date <= record["time"]), default=0)
            found.append(_Start(record["attempt"], record["step"], revision))
        elif record["event"] == "health" and "to_step" in record and found:
            found.append(_Start(record["attempt"], record["to_step"], found[-1].revision))
    return found


def _maker(starts: list[_Start], step: int) -> tuple[int | None, int | None]:
    """Attempt and revision that made ``step`` in the history that counts; None where none is on record."""
    start = next((start for start in reversed(starts) if start.step < step), None)
    return (None, None) if start is None else (start.attempt, start.revision)


def _written(run: RunDir, number: int) -> float:
    """When a revision was frozen, unix seconds: as its first line says, else as its file does."""
    path = run.revision_path(number)
    try:
        line = path.read_text(encoding="utf-8").partition("\n")[0]
        return datetime.strptime(line.rpartition(", ")[2], "%Y-%m-%d %H:%M:%S%z").timestamp()
    except OSError:
        return math.inf
    except ValueError:
        return path.stat().st_mtime


def _seconds(records: list[dict[str, Any]]) -> float | None:
    """Median seconds of a step on record."""
    found = [r["metrics"]["step_s"] for r in records if "step_s" in r.get("metrics", {})]
    return statistics.median(found) if found else None


def batch_of_step(step: int, skipped: Collection[int]) -> int:
    """The batch of the step (counted from 1) when ``skipped`` are left out."""
    batch = -1
    for _ in range(step):
        batch += 1
        while batch in skipped:
            batch += 1
    return batch


def _nearest(store: CheckpointStore, step: int, skipped: Collection[int], global_batch: int) -> tuple[Path | None, int]:
    """The newest checkpoint before ``step`` that left out the very batches that the step's history leaves out."""
    for candidate in reversed([found for found in store.steps() if found < step]):
        try:
            training = Manifest.load(store.path(candidate)).training
        except CorruptCheckpointError:
            continue
        position = int(training["samples"])
        behind = {batch for batch in skipped if batch * global_batch < position}
        if behind == {batch for batch in training.get("skipped", []) if batch * global_batch < position}:
            return store.path(candidate), candidate
    return None, 0
