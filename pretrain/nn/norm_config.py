"""Configuration of the norms between layers. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.nn.mixer_config import Violation, not_positive


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """RMSNorm between layers.

    Attributes:
        eps: added to the mean square, also by norms inside mixers.
    """

    eps: float = 1e-5

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix)."""
        yield from not_positive(self, {"eps": 1e-5})
