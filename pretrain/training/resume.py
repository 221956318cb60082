"""Continuing from a checkpoint: choose it, verify it together, hand it to the engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pretrain.checkpoint.damage import describe_damage
from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError, Manifest
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore, verify
from pretrain.config.schema import Config
from pretrain.engines.base import Engine
from pretrain.parallel.process import ProcessEnvironment, gather_objects
from pretrain.training.model_check import check_checkpoint_model
from pretrain.training.state import TrainState

logger = logging.getLogger("pretrain")


def resume(
    store: CheckpointStore, choice: str | None, config: Config, engine: Engine, env: ProcessEnvironment
) -> tuple[TrainState, dict[str, Any]]:
    """Load the chosen checkpoint (None: the latest, if any) into ``engine``.

    Returns the loop's state and the callbacks' states. Every rank returns, or every rank raises.

    Raises:
        CorruptCheckpointError: naming the damaged file and the newest intact checkpoint before it.
        CheckpointError: no such checkpoint, or another model.
    """
    folder = store.select(choice)
    if folder is None:
        return TrainState(), {}
    verify_together(store, folder, env)
    reader = CheckpointReader(folder)
    check_checkpoint_model(config, folder)
    import_together(engine, reader)
    state = TrainState.from_dict(reader.training)
    logger.info("continuing from %s at step %d", folder, state.step)
    return state, reader.training["callbacks"]


def import_together(engine: Engine, reader: CheckpointReader) -> None:
    """Load the state; raise the same error on every rank if it does not fit one of them."""
    failure = None
    try:
        engine.import_state(reader)
    except CheckpointError as error:
        failure = str(error)
    for text in gather_objects(failure):
        if text:
            raise CheckpointError(text)


def verify_together(store: CheckpointStore, folder: Path, env: ProcessEnvironment) -> None:
    """Check hashes with the files dealt to ranks; raise the same error on every rank."""
    if failures := hash_faults(folder, env):
        raise CorruptCheckpointError(describe_damage(store, folder, failures))


def hash_faults(folder: Path, env: ProcessEnvironment) -> list[str]:
    """What is damaged in a checkpoint, the same list on every rank; its files are dealt to the ranks."""
    failure = None
    try:
        files = sorted(Manifest.load(folder).files)[env.rank :: env.world_size]
        verify(folder, files)
    except CorruptCheckpointError as error:
        failure = str(error)
    return sorted({text for text in gather_objects(failure) if text})
