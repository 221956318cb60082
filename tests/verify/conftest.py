"""A tiny prepared data set for runs under verification."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from support.command import pretrain

VOCABULARY = 300


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the tiny experiment on real text: the modules of one small package of the standard library."""
    out = tmp_path_factory.mktemp("verify-data") / "json"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    result = pretrain(
        "data", "prepare", "text", source, out, "--pattern", "*.py", "--vocab-size", VOCABULARY,
        "--validation-fraction", "0.2", "--workers", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [
        "experiment=tiny",
        f"data.path={out}",
        f"model.vocab_size={VOCABULARY}",
        "data.sequence_length=32",
        "data.num_lanes=2",
    ]
