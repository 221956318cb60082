"""Checkpoint manifest: what a checkpoint holds and where each flat range of each logical tensor lies. Torch-free.

Format version 1. A checkpoint is a folder with one safetensors file per writing rank and ``manifest.json``::

    tensors: {"<slot>:<name>": {shape, dtype, fragments: [{file, start, stop}, ...]}}
    files:   {"<file>": {bytes, xxh3}}
    training: free-form state of the loop (step, samples, schedule, loader, ...)
    digest:  xxh3 of everything else

Slots in use: ``master`` (FP32 weight), ``weight`` (frozen parameter in its own dtype), ``exp_avg``, ``exp_avg_sq``
(Adam moments) and ``buffer``. Readers ignore slots they do not know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import xxhash

FORMAT = "pretrain-canonical"
VERSION = 1
MANIFEST_NAME = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint does not exist, or does not fit what it is asked for."""


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; earlier ones are untouched."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint under its final name is damaged."""


@dataclass(frozen=True)
class FragmentEntry:
    """Flat elements ``[start, stop)`` of a logical tensor, in ``file``."""

    file: str
    start: int
    stop: int


@dataclass
class TensorEntry:
    """Logical tensor of one slot: shape, safetensors dtype name, and its fragments."""

    shape: tuple[int, ...]
    dtype: str
    fragments: list[FragmentEntry] = field(default_factory=list)

    def check_coverage(self, key: str) -> None:
        """Raise ``CheckpointSaveError`` unless the fragments tile the tensor exactly once."""
        self.fragments.sort(key=lambda fragment: fragment.start)
        reached = 0
        for fragment in self.fragments:
            if fragment.start != reached:
                what = "overlap" if fragment.start < reached else "leave a gap"
                raise CheckpointSaveError(
                    f"{key}: fragments {what} at element {min(reached, fragment.start)} "
                    f"(shape {list(self.shape)}); nothing was saved under the final name"
                )
            reached = fragment.stop
        if reached != prod(self.shape):
            raise CheckpointSaveError(f"{key}: fragments end at element {reached}, shape {list(self.shape)}")


@dataclass
class Manifest:
    """Content of ``manifest.json``."""

    step: int
    tensors: dict[str, TensorEntry]
    files: dict[str, dict[str, Any]]
    training: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "version": self.version,
            "step": self.step,
            "training": self.training,
            "files": self.files,
            "tensors": {
                key: {
                    "shape": list(entry.shape),
                    "dtype": entry.dtype,
                    "fragments": [[f.file, f.start, f.stop] for f in entry.fragments],
                }
                for key, entry in sorted(self.tensors.items())
            },
        }
        body["digest"] = _digest(body)
        return json.dumps(body, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and verify the manifest of a checkpoint folder.

        Raises:
            CorruptCheckpointError: unreadable, altered, or of a newer format version.
        """
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_text())
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{path} is missing: {folder.name} is not a complete checkpoint") from None
        except (OSError, ValueError) as error:
            raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CorruptCheckpointError(f"{path}: format is not {FORMAT!r}")
        if body.get("version") != VERSION:
            raise CorruptCheckpointError(
                f"{path}: format version {body.get('version')} found, this release reads {VERSION}; "
                "use the release that wrote it"
            )
        digest = body.pop("digest", None)
        if digest != _digest(body):
            raise CorruptCheckpointError(f"{path}: content does not match its digest {digest}")
        return cls(
            step=body["step"],
            training=body["training"],
            files=body["files"],
            tensors={
                key: TensorEntry(tuple(e["shape"]), e["dtype"], [FragmentEntry(*f) for f in e["fragments"]])
                for key, e in body["tensors"].items()
            },
        )


def tensor_key(slot: str, name: str) -> str:
    """Key of a logical tensor in one slot."""
    return f"{slot}:{name}"


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, streamed in 8 MiB pieces."""
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(8 << 20):
            state.update(piece)
    return str(state.hexdigest())


def _digest(body: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode()))
