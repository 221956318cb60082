"""Callback: the extension seam of the loop. Every callback may keep state, which travels in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.training.health import BadStep
    from pretrain.training.loop import Trainer
    from pretrain.training.state import StepRecord


class Callback:
    """Hooks of the loop, called on every rank in the order of registration."""

    name = "callback"

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this attempt."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After every optimizer step."""

    def background_done(self) -> bool:
        """Whether work that this rank does in the background is finished; asked at every step boundary.

        A callback that overrides this is registered on every rank.
        """
        return False

    def on_background_done(self, trainer: Trainer) -> None:
        """All ranks' background work is finished: called on every rank, before :meth:`after_step`.

        The ranks agree by a number that travels with the loop's own sum, so waiting costs no communication.
        """

    def after_validation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After every validation that ran to its end."""

    def on_bad_step(self, trainer: Trainer, bad: BadStep) -> None:
        """A step's update was dropped because of its numbers, before ``bad.action`` is carried out.

        ``trainer.host_batches`` are this rank's micro-batches of it; no stream of data is open.
        """

    def before_rollback(self, trainer: Trainer) -> None:
        """A checkpoint to go back to is about to be chosen: publish what is under way."""

    def on_rollback(self, trainer: Trainer) -> None:
        """Engine, loop state and callbacks' states are those of an earlier checkpoint of this run again."""

    def on_common_failure(self, trainer: Trainer) -> None:
        """Training ends by a failure that every rank meets at the same step (a loss that is not finite)."""

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        """After the last step, or at a stop request; returns whether a stop request cut this callback's work short."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state to keep in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
