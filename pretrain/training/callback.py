"""Callback: the extension seam of the loop. Every callback may keep state, which travels in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer
    from pretrain.training.state import StepRecord


class Callback:
    """Hooks of the loop, called on every rank in the order of registration."""

    name = "callback"

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this attempt."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After every optimizer step."""

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        """After the last step, or at a stop request; returns whether a stop request cut this callback's work short."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state to keep in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
