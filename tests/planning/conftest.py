"""Subjects for checks of a preflight, made without composing a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.launch_schema import LocalConfig
from pretrain.config.schema import Config, RunConfig, TrackingConfig
from pretrain.models.hybrid.config import HybridConfig
from pretrain.planning.preflight.subject import Subject


@pytest.fixture
def subject(tmp_path: Path) -> Callable[..., Subject]:
    """A small sound run below the test's folder; nodes of the configuration may be replaced by keyword."""

    def make(*, run: Any = None, root: Path | None = None, tree: Any = None, **nodes: Any) -> Subject:
        config: dict[str, Any] = {
            "run": RunConfig(root=str(root or tmp_path)),
            "model": HybridConfig(pattern="M-", width=64, vocab_size=512),
            "launcher": LocalConfig(device="cpu"),
            "tracking": TrackingConfig(enabled=False),
        }
        return Subject(tree or {}, Config(**{**config, **nodes}), run)

    return make
