"""A tiny prepared data set and a way to call the ``pretrain`` command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.tracking.metrics_log import effective_records, read_records

VOCABULARY = 300


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: the modules of one small package of the standard library."""
    out = tmp_path_factory.mktemp("data") / "json"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    result = pretrain(
        "data", "prepare", "text", source, out, "--pattern", "*.py", "--vocab-size", VOCABULARY,
        "--validation-fraction", "0.2", "--workers", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out


def pretrain(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
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


@pytest.fixture
def start(data_path: Path, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], Outcome]]:
    """Start a tiny run in ``tmp_path/name`` with more overrides; returns the finished process and its run directory."""

    def call(name: str, *overrides: str) -> tuple[subprocess.CompletedProcess[str], Outcome]:
        path = tmp_path / name
        result = pretrain(
            "run",
            "--run-dir",
            path,
            "experiment=tiny",
            f"data.path={data_path}",
            f"model.vocab_size={VOCABULARY}",
            "data.sequence_length=32",
            "data.num_lanes=2",
            "train.sample_prompts=[]",
            *overrides,
            cwd=tmp_path,
        )
        return result, Outcome(path)

    return call


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or exist on one side only."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))
