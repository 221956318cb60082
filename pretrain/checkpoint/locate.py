"""Finding the checkpoint that a user means by a folder. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError

IMPORTED_CHECKPOINT = "checkpoint"
"""Where a folder written by ``pretrain import`` holds its weights."""


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint that ``folder`` is, or that an imported folder holds.

    Raises:
        CheckpointError: it is neither.
    """
    for place in (folder, folder / IMPORTED_CHECKPOINT):
        if (place / MANIFEST_NAME).is_file():
            return place
    found = f"a folder without {MANIFEST_NAME}" if folder.is_dir() else "no such folder"
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = "; it is a run directory: name one of its checkpoints/step_..."
    elif (folder / "config.json").is_file():
        hint = f"; it is in Hugging Face's format: `pretrain import {folder} NEW_FOLDER` first"
    raise CheckpointError(f"{folder}: {found}, expected a checkpoint, or what `pretrain import` wrote{hint}")
