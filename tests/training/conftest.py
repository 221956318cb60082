"""A way to start tiny runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Outcome, pretrain
from support.small_text import small_run


@pytest.fixture
def start(data_path: Path, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], Outcome]]:
    """Start a tiny run in ``tmp_path/name`` with more overrides; returns the finished process and its run directory."""

    def call(name: str, *overrides: str) -> tuple[subprocess.CompletedProcess[str], Outcome]:
        path = tmp_path / name
        result = pretrain(
            "run",
            "--run-dir",
            path,
            *small_run(data_path),
            "train.final_eval=true",
            *overrides,
            cwd=tmp_path,
        )
        return result, Outcome(path)

    return call
