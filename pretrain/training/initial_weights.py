"""Beginning a run with the weights of another checkpoint (``train.init_from``), on any engine and layout.

Weights and buffers are taken over: masters are these values, optimizer state is that of a run that has not begun.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from launchers.run_dir import RunDir
from pretrain.checkpoint.locate import checkpoint_folder
from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError, CorruptCheckpointError, Manifest
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import verify
from pretrain.config.schema import Config
from pretrain.engines.base import Engine
from pretrain.parallel.process import ProcessEnvironment
from pretrain.training.model_check import check_checkpoint_model
from pretrain.training.resume import hash_faults, import_together

logger = logging.getLogger("pretrain")


class WeightsOnly(CheckpointReader):
    """A checkpoint as the engine of a new run sees it: its own optimizer scalars, so that no moments are asked for."""

    def __init__(self, folder: Path, fresh_scalars: dict[str, float]) -> None:
        super().__init__(folder)
        self._fresh_scalars = fresh_scalars

    @property
    def training(self) -> dict[str, Any]:
        return {"optimizer_scalars": self._fresh_scalars}


def check_initial_weights(config: Config) -> None:
    """Before a run is created: is there such a checkpoint, is it whole, does it hold the configured model?

    Raises:
        CheckpointError: it does not exist, or holds another model; every tensor that differs is listed.
        CorruptCheckpointError: naming every damaged file.
    """
    assert config.train.init_from is not None
    folder = checkpoint_folder(Path(config.train.init_from))
    verify(folder)
    try:
        check_checkpoint_model(config, folder)
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from: {error}") from error


def initial_weights_digest(folder: Path) -> str:
    """The digest in a checkpoint's manifest, which covers the hashes of its files."""
    Manifest.load(folder)  # refuses one whose content does not match the digest
    return str(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["digest"])


def begin_with_weights(run: RunDir, config: Config, engine: Engine, env: ProcessEnvironment) -> None:
    """Take over the weights that ``train.init_from`` names; for a run without a checkpoint of its own.

    The run keeps the digest of the first start and refuses other weights later. Every rank returns, or every rank
    raises.

    Raises:
        CheckpointError: the folder is gone, or holds another model.
        CorruptCheckpointError: it is damaged.
        RunDirectoryError: it holds other weights than at the first start.
    """
    assert config.train.init_from is not None
    try:
        folder = checkpoint_folder(Path(config.train.init_from))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from: {error}. The run has no checkpoint yet and needs it.") from error
    if failures := hash_faults(folder, env):
        raise CorruptCheckpointError(". ".join(failures))
    run.check_initial_weights(str(folder), initial_weights_digest(folder))
    check_checkpoint_model(config, folder)
    import_together(engine, WeightsOnly(folder, engine.scalar_state()))
    logger.info("beginning with the weights of %s", folder)
