"""Importing a model of Hugging Face's: configuration, tokenizer, and a checkpoint that holds weights only.

An imported folder::

    model/imported.yaml   the model as an option of the config group `model`
    checkpoint/           the weights as a canonical checkpoint: every parameter as FP32 master, step 0
    tokenizer.json        and what lay beside it, where there was one
    import.json           where it comes from
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.convert import publish_folder
from pretrain.checkpoint.locate import IMPORTED_CHECKPOINT
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    CorruptCheckpointError,
    FragmentEntry,
    Manifest,
    TensorEntry,
    tensor_key,
)
from pretrain.checkpoint.rank_file import DTYPE_NAMES, StoredTensor, as_bytes, rank_file_name, write_safetensors
from pretrain.config.components import TARGET
from pretrain.config.files import atomic_write_text
from pretrain.exchange.architecture import ExchangeError
from pretrain.exchange.imported import IMPORT_FILE, MODEL_FILE
from pretrain.exchange.model_config import HYBRID, ImportedConfig, import_config
from pretrain.exchange.tensors import Plan
from pretrain.exchange.tokenizer import ACCOMPANYING, TOKENIZER_FILE, check_vocabulary
from pretrain.exchange.weights import ForeignWeights


@dataclass(frozen=True)
class Imported:
    """What was imported: configuration, number of parameters, remarks for the user."""

    config: ImportedConfig
    num_parameters: int
    notes: tuple[str, ...]


def import_folder(source: Path, target: Path) -> Imported:
    """Write the model in ``source`` to the new or empty folder ``target``. Holds one group of tensors in memory.

    Raises:
        ExchangeError: no such model, or one that cannot be expressed here; every reason is listed.
        CorruptCheckpointError: a file is damaged, or holds numbers that are not finite.
        CheckpointError: ``target`` holds something, or cannot be written; then nothing is left of it.
    """
    check_new_folder(target)
    config = import_config(read_json(source / "config.json"))
    notes = list(config.notes)
    tokenizer = source / TOKENIZER_FILE
    faults: list[str] = []
    if not tokenizer.is_file():
        notes.append(f"no {TOKENIZER_FILE} in {source}: prepare data with the tokenizer that belongs to the model")
    else:
        try:
            check_vocabulary(tokenizer, config.model.vocab_size)
        except ExchangeError as error:
            faults.append(str(error))
    weights = ForeignWeights(source)
    plan = Plan.of(config.architecture, config.model)
    faults += plan.faults(weights)
    if faults:
        raise ExchangeError(f"{source} cannot be imported:\n" + "\n".join(f"  {fault}" for fault in faults))

    def write(folder: Path) -> None:
        _write_checkpoint(folder / IMPORTED_CHECKPOINT, plan, weights, source)
        _write_model(folder, config)
        for name in (TOKENIZER_FILE, *ACCOMPANYING) if tokenizer.is_file() else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        facts = {"source": str(source.absolute()), "architecture": config.architecture.class_name, "notes": notes}
        atomic_write_text(folder / IMPORT_FILE, json.dumps(facts, indent=1) + "\n")

    publish_folder(target, write)
    return Imported(config, sum(torch.Size(shape).numel() for shape in plan.shapes.values()), tuple(notes))


def check_new_folder(target: Path) -> None:
    """Raise ``CheckpointError`` unless ``target`` does not exist or is an empty folder."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a new or empty folder; choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; choose another folder, nothing is ever overwritten")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ExchangeError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExchangeError(
            f"{path} is missing: expected a folder as `save_pretrained` writes it; name the one with config.json"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} cannot be read: {error}; restore it, or save the model again") from error
    if not isinstance(values, dict):
        raise ExchangeError(
            f"{path} holds {type(values).__name__}, expected an object; restore it, or save the model again"
        )
    return values


def _write_model(folder: Path, config: ImportedConfig) -> None:
    from pretrain.config.freeze import dump

    (folder / MODEL_FILE).parent.mkdir()
    head = f"# {config.architecture.class_name}, imported.\n"
    atomic_write_text(folder / MODEL_FILE, head + dump({TARGET: HYBRID, **config.tree}))


def _write_checkpoint(folder: Path, plan: Plan, weights: ForeignWeights, source: Path) -> None:
    folder.mkdir(parents=True)
    file, dtype = rank_file_name(0), DTYPE_NAMES[torch.float32]
    tensors, stored = {}, []
    for name in (name for group in plan.links for name in group.ours):
        shape, key = plan.shapes[name], tensor_key("master", name)
        whole = FragmentEntry(file, 0, torch.Size(shape).numel())
        tensors[key] = TensorEntry(shape, dtype, [whole])
        stored.append(StoredTensor(whole.key(key), dtype, (whole.stop,)))
    files = {file: write_safetensors(folder / file, stored, _data(plan, weights))}
    # Of a run that has not begun: what a reader of checkpoints asks for.
    training = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "optimizer_scalars": {"step": 0.0},
        "callbacks": {},
        "imported_from": str(source.absolute()),
        "architecture": plan.architecture.class_name,
        "precision": "fp32",
        "world_size": 1,
    }
    atomic_write_text(folder / MANIFEST_NAME, Manifest(0, tensors, files, training).to_json())


def _data(plan: Plan, weights: ForeignWeights) -> Iterator[Tensor]:
    stored = plan.stored_names(weights)
    broken = []
    for group in plan.links:
        for name, tensor in plan.to_ours(group, weights, stored):
            if not tensor.isfinite().all():
                broken.append(f"{', '.join(group.theirs)}: holds values that are not finite (read as {name})")
            yield as_bytes(tensor)
    if broken:
        raise CorruptCheckpointError(
            f"{weights.folder} is damaged; copy or download it again:\n" + "\n".join(f"  {fault}" for fault in broken)
        )
