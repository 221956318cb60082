"""Configuration of the objectives. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.objectives.next_token import NextTokenObjective


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Next-token cross-entropy.

    Attributes:
        z_loss: weight of the squared log-normaliser added in training (PaLM, arXiv 2204.02311, section 5),
            about 1e-4 when used; 0 for none.
        accuracy: report the share of targets that are the most likely token, in training and in validation.
        exact_match: report the share of answers (runs of neighbouring targets) that are right as a whole.
    """

    z_loss: float = 0.0
    accuracy: bool = False
    exact_match: bool = False

    def violations(self) -> Iterator[tuple[str, object, str, str]]:
        """Every broken rule as (field, found, rule, fix)."""
        if not self.z_loss >= 0:
            yield "z_loss", self.z_loss, "must not be negative", "set 0.0 (none) or about 1e-4"

    def build(self) -> NextTokenObjective:
        """Construct the objective."""
        from pretrain.objectives.next_token import NextTokenObjective

        return NextTokenObjective(self.z_loss, self.accuracy, self.exact_match)
