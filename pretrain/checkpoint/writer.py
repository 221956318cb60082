"""Writing canonical checkpoints: every rank streams its own fragments, rank 0 commits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointSaveError,
    FragmentEntry,
    Manifest,
    TensorEntry,
    tensor_key,
)
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.files import atomic_write_text

# https://huggingface.co/docs/safetensors: names of dtypes in the header.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_rank_file(path: Path, fragments: Sequence[Fragment]) -> dict[str, Any]:
    """Stream fragments into one safetensors file, one host copy at a time, and fsync it.

    Written here rather than with ``safetensors.torch.save_file`` because that wants every tensor in host memory at
    once. Returns ``{"bytes", "xxh3"}`` of the file.
    """
    header: dict[str, Any] = {}
    offset = 0
    for fragment in fragments:
        size = fragment.values.numel() * fragment.values.element_size()
        key = f"{tensor_key(fragment.slot, fragment.name)}:{fragment.start}"
        assert key not in header, f"fragment {key} exported twice by one rank"
        header[key] = {
            "dtype": DTYPE_NAMES[fragment.values.dtype],
            "shape": [fragment.values.numel()],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state = xxhash.xxh3_128()
    with path.open("wb") as stream:
        _put(stream, state, len(text).to_bytes(8, "little") + text)
        for fragment in fragments:
            host = fragment.values.detach().to("cpu").contiguous().view(torch.uint8)
            _put(stream, state, host.numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    return {"bytes": size, "xxh3": state.hexdigest()}


def _put(stream: BinaryIO, state: Any, data: Any) -> None:
    stream.write(data)
    state.update(data)


def save_checkpoint(
    store: CheckpointStore,
    fragments: Sequence[Fragment],
    training: dict[str, Any],
    *,
    step: int,
    attempt: int,
    rank: int,
    gather: Callable[[Any], list[Any]],
    fence: Callable[[], None],
) -> Path:
    """Save collectively: all ranks call this with their own fragments; returns the final folder.

    ``gather(value)`` returns every rank's value on every rank; ``fence()`` raises when this attempt no longer holds
    the run directory. Either every rank returns or every rank raises, and a failed save leaves no final name behind.

    Raises:
        CheckpointSaveError: with every rank's reason (disk full, lost lease, ...).
    """
    temporary = store.temporary_path(step, attempt)

    def prepare() -> None:
        fence()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> dict[str, Any]:
        facts = write_rank_file(temporary / rank_file_name(rank), fragments)
        facts["fragments"] = [
            (f.slot, f.name, list(f.shape), DTYPE_NAMES[f.values.dtype], f.start, f.start + f.values.numel())
            for f in fragments
        ]
        return facts

    def commit(reports: list[dict[str, Any]]) -> None:
        manifest = _merge(reports, step, training)
        atomic_write_text(temporary / MANIFEST_NAME, manifest.to_json())
        fence()
        store.commit(temporary, step)

    try:
        _together(gather, prepare if rank == 0 else None)
        reports = _together(gather, write)
        _together(gather, (lambda: commit(reports)) if rank == 0 else None)
    except CheckpointSaveError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return store.path(step)


def _together(gather: Callable[[Any], list[Any]], action: Callable[[], Any] | None) -> list[Any]:
    """Run ``action`` here, share results; raise the same error everywhere if any rank failed."""
    result, failure, cause = None, None, None
    try:
        result = action() if action else None
    except Exception as error:
        failure, cause = f"{type(error).__name__}: {error}", error
    outcomes = gather((result, failure))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise CheckpointSaveError(
            "The checkpoint was not saved; earlier checkpoints are untouched. " + "; ".join(failures)
        ) from cause
    return [value for value, _ in outcomes]


def _merge(reports: list[dict[str, Any]], step: int, training: dict[str, Any]) -> Manifest:
    tensors: dict[str, TensorEntry] = {}
    files = {}
    for rank, report in enumerate(reports):
        file = rank_file_name(rank)
        files[file] = {"bytes": report["bytes"], "xxh3": report["xxh3"]}
        for slot, name, shape, dtype, start, stop in report["fragments"]:
            entry = tensors.setdefault(tensor_key(slot, name), TensorEntry(tuple(shape), dtype))
            assert (entry.shape, entry.dtype) == (tuple(shape), dtype), f"{name}: ranks disagree on shape or dtype"
            entry.fragments.append(FragmentEntry(file, start, stop))
    for key, entry in tensors.items():
        entry.check_coverage(key)
    return Manifest(step=step, tensors=tensors, files=files, training=training)
