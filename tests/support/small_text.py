"""The small data set of runs in tests: real text, the modules of one small package of the standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from support.command import pretrain

VOCABULARY = 300


def prepare_small_text(out: Path) -> Path:
    """Prepare the data set in ``out`` with the command that users call."""
    source = Path(sysconfig.get_path("stdlib")) / "json"
    result = pretrain(
        "data", "prepare", "text", source, out, "--pattern", "*.py", "--vocab-size", VOCABULARY,
        "--validation-fraction", "0.2", "--workers", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out


def small_run(data_path: Path, sequence_length: int = 32) -> list[str]:
    """Overrides of the tiny experiment on the data set."""
    return [
        "experiment=tiny",
        f"data.path={data_path}",
        f"model.vocab_size={VOCABULARY}",
        f"data.sequence_length={sequence_length}",
        "data.num_lanes=2",
    ]
