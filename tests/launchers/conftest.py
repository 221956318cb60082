from __future__ import annotations

from pathlib import Path

import pytest

from launchers.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create({"run": {"name": "demo"}, "train": {"steps": 10}}, path=tmp_path / "run")
