"""Which batch a step of a run was made on, and from which checkpoint that step can be reached again. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
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
    (None: the step was not logged). ``checkpoint`` None stands for the initial weights.
    """

    step: int
    batch: int
    skipped: list[int]
    event: dict[str, Any] | None
    loss: float | None
    grad_norm: float | None
    checkpoint: Path | None
    checkpoint_step: int


def replay_target(run: RunDir, global_batch: int, step: int, batch: int | None = None) -> ReplayTarget:
    """The target for ``step``: the last bad batch at that step, else the batch that the step was made on.

    ``batch`` chooses among the batches that were tried at the step.

    Raises:
        ReplayError: there was no such step, or no such batch at it.
    """
    events = read_events(run.health_path)
    records = effective_records(read_records(run.metrics_path)) if run.metrics_path.is_file() else []
    made = max((record["step"] for record in records if record.get("step") is not None), default=0)
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
    return ReplayTarget(step, chosen, skipped, event, metrics.get("loss"), metrics.get("grad_norm"), folder, reached)


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
