"""Going back to an earlier checkpoint of the same run, in the running processes.

Batches that led to the bad step are left out from then on. Exactly as if the run had left them out from its beginning:
the checkpoint gone back to lies before the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpoint.manifest import CorruptCheckpointError, Manifest
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.parallel.process import ProcessEnvironment, gather_objects
from pretrain.parallel.pulse import PULSE
from pretrain.training.resume import hash_faults, import_together

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger("pretrain")


@dataclass(frozen=True)
class RollbackPlan:
    """The checkpoint to go back to, and the batches to leave out from there on."""

    folder: Path
    step: int
    skipped: list[int]


class Rollback:
    """Chooses and loads checkpoints of ``store``. Collective.

    ``fence`` raises when this attempt no longer holds the run directory.
    """

    def __init__(
        self, store: CheckpointStore, env: ProcessEnvironment, *, attempt: int, fence: Callable[[], None]
    ) -> None:
        self._store = store
        self._env = env
        self._attempt = attempt
        self._fence = fence

    def plan(self, window: Sequence[int], global_batch: int) -> RollbackPlan | None:
        """The newest intact checkpoint before the first batch of ``window``, none of which is to be trained on.

        Where none is left from before the window, the newest before its last batch: then only the batches after the
        checkpoint can be left out. None when there is no such checkpoint either.
        """
        # Rank 0's view of the folder is everyone's.
        found = gather_objects(self._positions() if self._env.rank == 0 else None)[0]
        before = [step for step, samples in found if samples <= window[0] * global_batch]
        within = [step for step, samples in found if window[0] * global_batch < samples <= window[-1] * global_batch]
        positions = dict(found)
        for step in (*reversed(before), *reversed(within)):
            folder = self._store.path(step)
            if faults := hash_faults(folder, self._env):
                logger.warning("cannot go back to %s: %s", folder, "; ".join(faults))
                continue
            left_out = [batch for batch in window if batch * global_batch >= positions[step]]
            return RollbackPlan(folder, step, left_out)
        return None

    def carry_out(self, trainer: Trainer, plan: RollbackPlan) -> None:
        """Load the checkpoint into engine, loop state and callbacks; later ones are set aside, never to be chosen."""
        with PULSE.during("save", f"going back to step {plan.step}"):
            if self._env.rank == 0:
                self._fence()
                self._store.set_aside(plan.step, self._attempt)
            reader = CheckpointReader(plan.folder)
            import_together(trainer.engine, reader)
        trainer.state.go_back(reader.training, trainer.config.train.global_batch_size)
        states = reader.training["callbacks"]
        for callback in trainer.callbacks:
            callback.load_state_dict(states.get(callback.name, {}))
        logger.warning("went back to %s; left out from there: batches %s", plan.folder, plan.skipped)

    def _positions(self) -> list[tuple[int, int]]:
        """Steps of all checkpoints with the samples passed by until then, ascending; unreadable ones are left out."""
        found = []
        for step in self._store.steps():
            try:
                found.append((step, int(Manifest.load(self._store.path(step)).training["samples"])))
            except CorruptCheckpointError as error:
                logger.warning("%s", error)
        return found
