"""Concern: the checkpoints that are kept at the same time fit on the disk and in the quota. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.schema import Config, TrainConfig
from pretrain.nn.cost import FP32
from pretrain.planning.preflight.findings import Finding, error, ok, unknown, warning
from pretrain.planning.preflight.quota import quotas
from pretrain.planning.preflight.storage import file_system, nearest_folder
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import size

MANIFEST_BYTES = 1 << 18
RANK_HEADER_BYTES = 1 << 15
"""Of a checkpoint besides numbers: the manifest, and the header of each rank's file; generous."""
_TIGHT = 0.8


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint, and how they are known."""

    num_bytes: int
    source: str


def check(subject: Subject) -> Iterator[Finding]:
    """Bytes of a checkpoint x those kept at the same time, against free space, quota and inodes."""
    one = checkpoint_size(subject)
    if one is None:
        yield unknown(
            "checkpoint size",
            "the model states no number of parameters, and there is no checkpoint of it yet",
            "the first checkpoint tells: `pretrain checkpoint list RUN`",
        )
        return
    train = subject.config.train
    kept = most_kept(train)
    present = _present_bytes(subject)
    needed = max(one.num_bytes * kept - present, 0)
    folder = nearest_folder(subject.place)
    budget = f"{kept} x {size(one.num_bytes)} ({one.source}; {_retention(train)}, and one being written)"
    if present:
        budget += f", {size(present)} of them there already"
    files = kept * (subject.config.launcher.num_processes + 1)
    try:
        facts = os.statvfs(folder)
    except OSError as fault:
        yield unknown("free space", f"{folder}: {fault.strerror}")
        return
    if not facts.f_blocks:
        yield unknown("free space", f"{folder} is on a file system that tells no size")
        return
    free = facts.f_bavail * facts.f_frsize
    yield _judged("free space", f"in {folder}", free, needed, budget, one.num_bytes, train, present)
    if facts.f_files and facts.f_favail < files:
        yield error(
            "inodes",
            f"{facts.f_favail:,} free in {folder}",
            f"{files:,}: a file for each rank and a manifest in {kept} checkpoints",
            "remove small files there, or choose another run.root",
        )
    found = quotas(folder, file_system(folder))
    for quota in found:
        if quota.bytes_left is not None:
            yield _judged(
                "quota", f"left to {quota.whose}", quota.bytes_left, needed, budget, one.num_bytes, train, present
            )
        if quota.files_left is not None and quota.files_left < files:
            yield error(
                "quota of files",
                f"{quota.files_left:,} files left to {quota.whose}",
                f"{files:,} files for {kept} checkpoints",
                "remove small files there, have the quota raised, or choose another run.root",
            )
    if not found:
        yield unknown("quota", f"none that this host can read for {folder}; free space counts")


def checkpoint_size(subject: Subject) -> CheckpointSize | None:
    """From the run's newest checkpoint, else from the number of parameters; None when neither is known."""
    run = subject.run
    newest = CheckpointStore(run.checkpoints_path).latest() if run is not None else None
    if newest is not None:
        try:
            files = Manifest.load(newest).files
        except CheckpointError:
            pass  # `resume` says so
        else:
            return CheckpointSize(sum(int(file["bytes"]) for file in files.values()), f"as {newest.name}")
    if subject.parameters is None:
        return None
    numbers = state_numbers(subject.config, subject.parameters)
    extra = MANIFEST_BYTES + RANK_HEADER_BYTES * subject.config.launcher.num_processes
    each = numbers * FP32 / max(subject.parameters, 1)
    return CheckpointSize(numbers * FP32 + extra, f"{subject.parameters:,} parameters x {each:.3g} bytes, and headers")


def state_numbers(config: Config, parameters: int) -> int:
    """FP32 numbers that a checkpoint holds: masters and two moments; one for the matrices that Muon updates."""
    if config.optimizer.name != "muon":
        return 3 * parameters
    from pretrain.models.hybrid.cost import EMBEDDING, HEAD, NORMS, cost_by_part

    parts = cost_by_part(config.model, 1)
    adamw = sum(parts[name].parameters for name in (EMBEDDING, NORMS, HEAD))
    # A layer's few vectors have two moments as well: a margin of a fiftieth covers them.
    return 3 * adamw + round(2 * (parameters - adamw) * 1.02)


def most_kept(train: TrainConfig) -> int:
    """Checkpoints on disk at the same time at most: what retention keeps, and the one being written."""
    interval = train.checkpoint_interval
    saved = list(range(interval, train.steps + 1, interval)) if interval else []
    if not saved or saved[-1] != train.steps:
        saved.append(train.steps)
    before = saved[:-1]
    newest = min(train.keep_checkpoints, len(before))
    older = before[: len(before) - newest]
    every = sum(1 for step in older if train.keep_every and step % train.keep_every == 0)
    best = min(train.keep_best, len(older) - every)
    return newest + every + best + 1


def _judged(
    what: str, where: str, free: int, needed: int, budget: str, one: int, train: TrainConfig, present: int
) -> Finding:
    figures: dict[str, float] = {"free": free, "needed": needed, "checkpoint": one}
    if needed > free:
        fitting = (free + present) // one
        return error(
            what,
            f"{size(free)} {where}",
            f"{size(needed)} for checkpoints: {budget}",
            _way_out(train, fitting) + ", free space there, or another run.root",
            **figures,
        )
    if needed > _TIGHT * free:
        return warning(
            what,
            f"{size(free)} {where}, of which checkpoints will take {size(needed)}",
            f"room to spare beside {budget}",
            "fewer checkpoints (train.keep_checkpoints, train.keep_every, train.keep_best), or another run.root",
            **figures,
        )
    return ok(what, f"{size(free)} {where}; checkpoints take {size(needed)}: {budget}", **figures)


def _way_out(train: TrainConfig, fitting: int) -> str:
    """Settings with which at most ``fitting`` checkpoints are there at the same time."""
    if fitting < 2:
        return f"room for {fitting} checkpoint{'s' if fitting != 1 else ''} only: at least 2 are needed"
    beside = f"train.keep_every={train.keep_every}" if train.keep_every else ""
    newest = fitting - 1 - train.keep_best
    if not train.keep_every and newest >= 1:
        return f"train.keep_checkpoints={newest}"
    fix = f"train.keep_checkpoints={min(train.keep_checkpoints, fitting - 1)} train.keep_every=0 train.keep_best=0"
    return f"{fix} (now {beside or f'train.keep_best={train.keep_best}'})"


def _retention(train: TrainConfig) -> str:
    parts = [f"the newest {train.keep_checkpoints}"]
    if train.keep_every:
        parts.append(f"every {train.keep_every:,} steps")
    if train.keep_best:
        parts.append(f"the best {train.keep_best}")
    return ", ".join(parts)


def _present_bytes(subject: Subject) -> int:
    """Of this run's checkpoints, those that retention counts."""
    if subject.run is None:
        return 0
    store = CheckpointStore(subject.run.checkpoints_path)
    return sum(_folder_bytes(store.path(step)) for step in store.steps())


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:
        return 0
