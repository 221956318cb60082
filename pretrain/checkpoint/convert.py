"""Rewriting a checkpoint: whole tensors, another format version, or plain weights; one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    VERSION,
    CheckpointError,
    FragmentEntry,
    Manifest,
    TensorEntry,
    tensor_key,
)
from pretrain.checkpoint.rank_file import DTYPE_NAMES, DTYPES, StoredTensor, as_bytes, rank_file_name, write_safetensors
from pretrain.checkpoint.reader import CheckpointReader, weight_slot
from pretrain.checkpoint.store import checkpoint_step, verify
from pretrain.config.files import atomic_write_text, fsync_directory

WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class _Copy:
    """A logical tensor of the source, and what becomes of it."""

    name: str
    slot: str
    stored: StoredTensor


def convert_checkpoint(source: Path, target: Path, *, version: int = VERSION, num_files: int = 1) -> list[Path]:
    """Write checkpoint folder ``source`` (any readable version) to ``target``, every tensor as one piece.

    The files of ``source`` are verified first. Returns the files written.

    Raises:
        CorruptCheckpointError: the source is damaged.
        CheckpointError: ``target`` holds something, or cannot be written; then nothing is left of it.
    """
    _check_target(source, target, num_files)
    verify(source)
    reader = CheckpointReader(source)
    copies = []
    for key, entry in reader.manifest.tensors.items():
        slot, name = key.split(":", 1)
        whole = FragmentEntry("", 0, prod(entry.shape))
        copies.append(_Copy(name, slot, StoredTensor(whole.key(key), entry.dtype, (whole.stop,))))

    def write(folder: Path) -> None:
        tensors, files = {}, {}
        for number, share in enumerate(_shares(copies, num_files)):
            file = rank_file_name(number)
            files[file] = write_safetensors(folder / file, [copy.stored for copy in share], _data(reader, share))
            for copy in share:
                shape = reader.shape(copy.name, copy.slot)
                fragment = FragmentEntry(file, 0, prod(shape))
                tensors[tensor_key(copy.slot, copy.name)] = TensorEntry(shape, copy.stored.dtype, [fragment])
        manifest = Manifest(reader.manifest.step, tensors, files, reader.training, version)
        atomic_write_text(folder / MANIFEST_NAME, manifest.to_json())

    return publish_folder(target, write)


def export_weights(source: Path, target: Path, *, dtype: str | None = None, num_files: int = 1) -> list[Path]:
    """Write weights and buffers alone as plain safetensors under their logical names, for use elsewhere.

    ``dtype`` (``bf16`` or ``fp32``) converts floating-point tensors; None keeps what is stored, FP32 for trained
    weights. Several files come with the index that Hugging Face's loaders read. Otherwise as
    :func:`convert_checkpoint`.
    """
    _check_target(source, target, num_files)
    verify(source)
    reader = CheckpointReader(source)
    names = {name: weight_slot(reader, name) for slot in ("master", "weight") for name in reader.names(slot)}
    names |= dict.fromkeys(reader.names("buffer"), "buffer")
    copies = []
    for name, slot in sorted(names.items()):
        kept = reader.dtype(name, slot)
        wanted = WEIGHT_DTYPES[dtype] if dtype and kept.is_floating_point else kept
        copies.append(_Copy(name, slot, StoredTensor(name, DTYPE_NAMES[wanted], reader.shape(name, slot))))

    def write(folder: Path) -> None:
        shares = _shares(copies, num_files)
        weight_map: dict[str, str] = {}
        for number, share in enumerate(shares, start=1):
            file = f"model-{number:05d}-of-{len(shares):05d}.safetensors" if len(shares) > 1 else "model.safetensors"
            stored = [copy.stored for copy in share]
            write_safetensors(folder / file, stored, _data(reader, share), metadata={"format": "pt"})
            weight_map |= dict.fromkeys((copy.name for copy in share), file)
        if len(shares) > 1:
            total = sum(copy.stored.num_bytes for copy in copies)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            atomic_write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))

    return publish_folder(target, write)


def _check_target(source: Path, target: Path, num_files: int) -> None:
    faults = []
    if num_files < 1:
        faults.append(f"files: {num_files}, expected at least 1")
    if target.exists() and not target.is_dir():
        faults.append(f"{target} is a file, expected a new or empty folder; choose another name")
    elif target.is_dir() and any(target.iterdir()):
        faults.append(f"{target} is not empty; choose another folder, nothing is ever overwritten")
    named, step = checkpoint_step(target.name), Manifest.load(source).step
    if named not in (None, step):
        faults.append(f"{target} is named for step {named}, the checkpoint is of step {step}; choose another name")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        faults.append(f"{target} lies inside the checkpoint to convert; choose a folder outside of {source}")
    if faults:
        raise CheckpointError("\n".join(faults))


def _shares(copies: list[_Copy], num_files: int) -> list[list[_Copy]]:
    """Deal tensors to at most ``num_files`` files in order, by bytes."""
    total = max(1, sum(copy.stored.num_bytes for copy in copies))
    shares: list[list[_Copy]] = [[] for _ in range(num_files)]
    reached = 0
    for copy in copies:
        shares[min(num_files - 1, reached * num_files // total)].append(copy)
        reached += copy.stored.num_bytes
    return [share for share in shares if share]


def _data(reader: CheckpointReader, copies: list[_Copy]) -> Iterator[Tensor]:
    for copy in copies:
        yield as_bytes(reader.tensor(copy.name, copy.slot).to(DTYPES[copy.stored.dtype]))


def publish_folder(target: Path, write: Callable[[Path], None]) -> list[Path]:
    """Call ``write(folder)`` on a temporary folder beside ``target`` and rename it when it is complete."""
    temporary = target.with_name(f".tmp_{target.name}_{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        fsync_directory(temporary)
        temporary.replace(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} was not written, and nothing is left of it: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(target.parent)
    return sorted(target.iterdir())
