"""Going back to an earlier checkpoint of the same run, in the running processes.

Batches that led to the bad step are left out from then on. Exactly as if the run had left them out from its beginning:
the checkpoint gone back to lies before the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError, Manifest
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

    def plan(self, window: Sequence[int], global_batch: int, doubtful: int | None = None) -> RollbackPlan | None:
        """The newest intact checkpoint before the first batch of ``window``, none of which is to be trained on.

        Where none is left from before the window, the newest before its last batch: then only the batches after the
        checkpoint can be left out. None when there is no such checkpoint either. The checkpoint of step ``doubtful``
        is taken only when there is no other.
        """
        # Rank 0's view of the folder is everyone's.
        found = gather_objects(self._positions() if self._env.rank == 0 else None)[0]
        before = [step for step, samples in found if samples <= window[0] * global_batch]
        within = [step for step, samples in found if window[0] * global_batch < samples <= window[-1] * global_batch]
        positions = dict(found)
        for step in sorted((*reversed(before), *reversed(within)), key=lambda step: step == doubtful):
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


def finish_rollback(
    store: CheckpointStore,
    choice: str | None,
    events: Sequence[dict[str, Any]],
    global_batch: int,
    *,
    attempt: int,
    fence: Callable[[], None],
) -> str | None:
    """Carry out what an earlier attempt wrote down in ``events`` and did not live to do; returns the choice to make.

    A checkpoint that was trained on batches which the run left out by going back belongs to the history that it left.
    If ``choice`` (as of :meth:`CheckpointStore.select`) is one of them, the checkpoint that was to be gone back to
    takes its place; all of them are set aside. Call only as the one writer.

    Raises:
        CheckpointError: the checkpoint that was to be gone back to is gone.
    """
    chosen = store.select(choice)
    if chosen is None or not (backs := [event for event in events if event["action"] == "rollback"]):
        return choice
    left = {step: left_by for step in store.steps() if (left_by := _left_by(store.path(step), backs, global_batch))}
    # By the folder's name: a damaged manifest is for the verification that follows to tell of.
    steps = {store.path(step).name: step for step in store.steps()}
    after = steps[chosen.name]
    if after in left:
        event = min(left[after], key=lambda event: int(event["to_step"]))
        after = int(event["to_step"])
        if not store.path(after).is_dir():
            raise CheckpointError(
                f"{chosen} was trained on batches {event['skipped']}, which the run left out at bad step "
                f"{event['step']} by going back to {store.path(after).name}; that is missing. Restore it, choose an "
                "earlier checkpoint with --checkpoint, or remove the step's file in health/ to train on the batches"
            )
        logger.warning(
            "bad step %d: going back to step %d had not been finished; batches %s are left out from there",
            event["step"],
            after,
            event["skipped"],
        )
        choice = store.path(after).name
    if any(step > after for step in left):
        fence()
        moved = store.set_aside(after, attempt)
        logger.warning("set aside, as of the history that the run went back from: %s", ", ".join(moved))
    return choice


def _left_by(folder: Path, events: Sequence[dict[str, Any]], global_batch: int) -> list[dict[str, Any]]:
    """Those of ``events`` that left out batches on which the checkpoint was trained."""
    try:
        training = Manifest.load(folder).training
    except CorruptCheckpointError:
        return []
    passed, kept_out = int(training["samples"]), set(training.get("skipped", []))
    return [
        event
        for event in events
        if any(batch * global_batch < passed and batch not in kept_out for batch in event["skipped"])
    ]
