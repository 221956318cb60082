"""Offloaded optimizer state under watch: predicted and actual times in the records of steps, timelines, new plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.training.callback import Callback

if TYPE_CHECKING:
    from pretrain.optim.offload.online import Online
    from pretrain.optim.offload.states import OffloadedStates
    from pretrain.training.callbacks import EventLog
    from pretrain.training.loop import Trainer
    from pretrain.training.state import StepRecord


class OffloadCallback(Callback):
    """Watches the ``OffloadedStates`` of the engine, its attribute ``offload.states`` (``offload``: None where a rank
    has none).

    Adds :meth:`~pretrain.optim.offload.online.Online.report` to the records that are logged, and an event ``offload``
    for every decision about the plan; of rank 0, while every rank plans for itself and tells its own log. Register it
    before the callback that logs.

    Args:
        folder: where timelines go.
    """

    name = "offload"

    def __init__(self, log: EventLog, folder: Path, *, rank: int) -> None:
        self._log = log
        self._folder = folder
        self._rank = rank
        self._online: Online | None = None

    def on_start(self, trainer: Trainer) -> None:
        from pretrain.optim.offload.online import Online

        offload = getattr(trainer.engine, "offload", None)
        if offload is None:
            return
        states: OffloadedStates = offload.states
        self._online = Online(states, journal=self._tell, folder=self._folder, rank=self._rank)
        self._online.begin(trainer.state.step)
        states.watcher = self._online

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if self._online is None:
            return
        if "forward" in record.seconds and trainer.host_batches:
            self._online.tell_forward(record.seconds["forward"] / len(trainer.host_batches))
        train = trainer.config.train
        if train.log_interval and (record.step % train.log_interval == 0 or record.step in (1, train.steps)):
            record.metrics.update(self._online.report())
        self._online.write_timelines()

    def on_rollback(self, trainer: Trainer) -> None:
        if self._online is not None:
            self._online.begin(trainer.state.step)

    def on_end(self, trainer: Trainer, interrupted: bool) -> bool:
        if self._online is not None:
            self._online.close()
        return False

    def _tell(self, fields: dict[str, Any]) -> None:
        self._log.write("offload", **fields)
