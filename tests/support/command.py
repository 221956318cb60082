"""Calling the ``pretrain`` command as a user does, and reading what a run left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.tracking.metrics_log import effective_records, read_records


def pretrain(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@dataclass(frozen=True)
class Outcome:
    """A run directory as a reader sees it."""

    path: Path

    def losses(self) -> dict[int, float]:
        records = effective_records(read_records(self.path / "metrics.jsonl"))
        return {record["step"]: record["metrics"]["loss"] for record in records if record["event"] == "train"}

    def validation(self) -> dict[int, float]:
        records = effective_records(read_records(self.path / "metrics.jsonl"))
        return {r["step"]: r["metrics"]["validation_loss"] for r in records if r["event"] == "eval"}

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        reader = CheckpointReader(CheckpointStore(self.path / "checkpoints").path(step))
        return {f"{slot}:{name}": reader.tensor(name, slot) for slot in reader.slots() for name in reader.names(slot)}


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or exist on one side only."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))
