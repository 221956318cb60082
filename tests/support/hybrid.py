"""Hybrid configurations by dotted field names."""

from __future__ import annotations

import dataclasses
from typing import Any

from pretrain.models.hybrid.config import HybridConfig


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a (nested) dataclass with other values; ``{"attention.num_heads": 4}`` changes a nested field."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        config = dataclasses.replace(config, **{name: changed(getattr(config, name), {rest: value}) if rest else value})
    return config


def hybrid(pattern: str, width: int, vocab_size: int, **changes: Any) -> HybridConfig:
    """A configuration with nested fields given as ``attention__num_heads=4``."""
    config = HybridConfig(pattern=pattern, width=width, vocab_size=vocab_size)
    return changed(config, {name.replace("__", "."): value for name, value in changes.items()})
