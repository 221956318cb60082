"""A tiny prepared data set, and a way to start runs on it."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Outcome, pretrain

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
            "train.final_eval=true",
            *overrides,
            cwd=tmp_path,
        )
        return result, Outcome(path)

    return call
