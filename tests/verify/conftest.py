"""The tiny experiment under verification."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_text import small_run


@pytest.fixture(scope="session")
def tiny_overrides(data_path: Path) -> list[str]:
    """Overrides of the tiny experiment on real text."""
    return small_run(data_path)
