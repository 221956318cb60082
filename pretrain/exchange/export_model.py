"""Exporting a checkpoint as a folder that ``from_pretrained`` of ``transformers`` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.convert import WEIGHT_DTYPES, publish_folder
from pretrain.checkpoint.rank_file import DTYPE_NAMES, DTYPES, StoredTensor, as_bytes, write_safetensors
from pretrain.checkpoint.reader import CheckpointReader, check_model, weight_slot
from pretrain.checkpoint.store import verify
from pretrain.config.files import atomic_write_text
from pretrain.exchange.architecture import Link, Tree
from pretrain.exchange.import_model import check_new_folder
from pretrain.exchange.model_config import export_config, export_notes
from pretrain.exchange.tensors import Plan, meta_model
from pretrain.exchange.tokenizer import (
    ACCOMPANYING,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    check_vocabulary,
    special_ids,
    tokenizer_config,
)
from pretrain.exchange.weights import INDEX_FILE, SINGLE_FILE
from pretrain.models.hybrid.config import HybridConfig

SHARD_BYTES = 4 << 30
"""Largest file of weights by default; a single larger tensor gets a file of its own."""

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Exported:
    """What was written: class of ``transformers``, files, remarks for the user."""

    class_name: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export_folder(
    checkpoint: Path,
    config: HybridConfig,
    target: Path,
    *,
    architecture: str = "auto",
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the weights of a checkpoint, its model's configuration and its tokenizer to a new or empty folder.

    ``architecture`` is a ``model_type``, or ``auto``; ``dtype`` is ``fp32`` or ``bf16`` (rounded to nearest).

    Raises:
        ExchangeError: the model is not of the architecture (every reason is listed), or the tokenizer does not fit.
        CheckpointError: the checkpoint holds another model, or ``target`` holds something.
        CorruptCheckpointError: the checkpoint is damaged.
    """
    check_new_folder(target)
    kind, settings = export_config(config, architecture)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    verify(checkpoint)
    reader = CheckpointReader(checkpoint)
    check_model(meta_model(config), reader)
    plan = Plan.of(kind, config)
    settings |= {"dtype": _TORCH_NAMES[dtype], "torch_dtype": _TORCH_NAMES[dtype]}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        settings |= special_ids(tokenizer)

    def write(folder: Path) -> None:
        _write_weights(folder, _shards(plan, DTYPE_NAMES[WEIGHT_DTYPES[dtype]], shard_bytes), plan, reader)
        _write_json(folder / "config.json", settings)
        ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id") if settings[name] is not None}
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)

    files = publish_folder(target, write)
    return Exported(kind.class_name, tuple(files), tuple(export_notes(config, kind)))


@dataclass(frozen=True)
class _Piece:
    """Tensors of theirs that are written together, and what they are made of (None: zeros)."""

    stored: tuple[StoredTensor, ...]
    source: Link | None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.stored)


def _shards(plan: Plan, dtype: str, limit: int) -> list[list[_Piece]]:
    """Tensors in order, in files of at most ``limit`` bytes where single groups of tensors allow it."""
    links = list(plan.links)
    if plan.copied_head:
        links.append(Link((plan.architecture.head,), ("embedding.weight",)))
    pieces = []
    for group in links:
        shape = group.their_shape(plan.shapes)
        pieces.append(_Piece(tuple(StoredTensor(name, dtype, shape) for name in group.theirs), group))
    for name, shape in plan.architecture.zeros(plan.config).items():
        pieces.append(_Piece((StoredTensor(name, "F32", shape),), None))
    shards: list[list[_Piece]] = [[]]
    used = 0
    for piece in pieces:
        if shards[-1] and used + piece.num_bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used += piece.num_bytes
    return shards


def _write_weights(folder: Path, shards: Sequence[Sequence[_Piece]], plan: Plan, reader: CheckpointReader) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        stored = [tensor for piece in shard for tensor in piece.stored]
        write_safetensors(folder / file, stored, _data(shard, plan, reader), metadata={"format": "pt"})
        weight_map |= dict.fromkeys((tensor.key for tensor in stored), file)
    if len(shards) > 1:
        total = sum(piece.num_bytes for shard in shards for piece in shard)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _data(pieces: Sequence[_Piece], plan: Plan, reader: CheckpointReader) -> Iterator[Tensor]:
    for piece in pieces:
        if piece.source is None:
            for tensor in piece.stored:
                yield as_bytes(torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype]))
            continue
        ours = [reader.tensor(name, weight_slot(reader, name)) for name in piece.source.ours]
        theirs = plan.to_theirs(piece.source, ours)
        for expected, (name, values) in zip(piece.stored, theirs, strict=True):
            assert expected.key == name, f"{name} written in the place of {expected.key}"
            yield as_bytes(values.to(DTYPES[expected.dtype]))


def _write_tokenizer(folder: Path, tokenizer: Path) -> None:
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    for name in ACCOMPANYING:
        if tokenizer.with_name(name).is_file():
            shutil.copyfile(tokenizer.with_name(name), folder / name)
    if not (folder / TOKENIZER_CONFIG).is_file():
        _write_json(folder / TOKENIZER_CONFIG, tokenizer_config(tokenizer))


def _write_json(path: Path, values: Tree) -> None:
    atomic_write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
