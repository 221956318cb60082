"""Checkpoint manifest: what a checkpoint holds and where each piece of each logical tensor lies. Torch-free.

Format version 2. A checkpoint is a folder with one safetensors file per writing rank and ``manifest.json``::

    tensors: {"<slot>:<name>": {shape, dtype, fragments: [[file, start, stop], ...]}}
    files:   {"<file>": {bytes, xxh3}}
    training: free-form state of the loop (step, samples, schedule, loader, ...)
    digest:  xxh3 of everything else

A fragment is the flat range [start, stop) of the row-major tensor; or, as ``[file, start, stop, row_length, first,
last]``, elements [start, stop) of the shard that holds columns [first, last) of the tensor seen as rows of
``row_length`` elements, counted in the shard's own row-major order. Version 1 knows only the first form.

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

from pretrain.parallel.pulse import PULSE
from pretrain.parallel.shard import Shard

FORMAT = "pretrain-canonical"
VERSION = 2
READABLE = (1, 2)
MANIFEST_NAME = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint does not exist, or does not fit what it is asked for."""


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; earlier ones are untouched."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint under its final name is damaged."""


@dataclass(frozen=True)
class FragmentEntry:
    """Elements ``[start, stop)`` of ``shard`` (in its own row-major order), in ``file``; no shard: of the tensor."""

    file: str
    start: int
    stop: int
    shard: Shard | None = None

    @classmethod
    def of(cls, file: str, start: int, stop: int, shard: Shard) -> FragmentEntry:
        """The entry of a piece of ``shard``; a piece that is a flat range of the tensor is stored as one."""
        if not shard.is_contiguous:
            return cls(file, start, stop, shard)
        offset = shard.start if shard.num_rows == 1 else 0
        return cls(file, offset + start, offset + stop)

    @classmethod
    def from_list(cls, values: list[Any], numel: int) -> FragmentEntry:
        file, start, stop, *columns = values
        if not columns:
            return cls(file, start, stop)
        row_length, first, last = columns
        return cls(file, start, stop, Shard(numel // row_length, row_length, first, last))

    def to_list(self) -> list[Any]:
        columns = [self.shard.row_length, self.shard.start, self.shard.stop] if self.shard else []
        return [self.file, self.start, self.stop, *columns]

    def key(self, tensor: str) -> str:
        """Name of the piece inside its file; ``tensor`` is the :func:`tensor_key`."""
        columns = f"@{self.shard.row_length}:{self.shard.start}-{self.shard.stop}" if self.shard else ""
        return f"{tensor}:{self.start}{columns}"


@dataclass
class TensorEntry:
    """Logical tensor of one slot: shape, safetensors dtype name, and its fragments."""

    shape: tuple[int, ...]
    dtype: str
    fragments: list[FragmentEntry] = field(default_factory=list)

    def check_coverage(self, key: str) -> None:
        """Raise ``CheckpointSaveError`` unless the fragments tile the tensor exactly once.

        Either flat ranges tile the tensor; or all fragments are of shards with one row length, whose column ranges
        tile a row, and flat ranges tile each shard.
        """
        whole = Shard.whole(self.shape)
        pieces: dict[Shard, list[tuple[int, int]]] = {}
        for fragment in self.fragments:
            pieces.setdefault(fragment.shard or whole, []).append((fragment.start, fragment.stop))
        if len({shard.row_length for shard in pieces}) > 1:
            raise CheckpointSaveError(
                f"{key}: fragments are split along different dimensions (shape {list(self.shape)}); "
                "nothing was saved under the final name"
            )
        row_length = next(iter(pieces), whole).row_length
        self._check_tiling(key, "column", [(shard.start, shard.stop) for shard in pieces], row_length)
        for shard, ranges in pieces.items():
            where = "element" if shard == whole else f"element of columns {shard.start}..{shard.stop}, its"
            self._check_tiling(key, where, ranges, shard.numel)

    def _check_tiling(self, key: str, what: str, ranges: list[tuple[int, int]], length: int) -> None:
        reached = 0
        for start, stop in [*sorted(ranges), (length, length)]:
            if start != reached:
                fault = "overlap" if start < reached else "leave a gap"
                raise CheckpointSaveError(
                    f"{key}: fragments {fault} at {what} {min(reached, start)} "
                    f"(shape {list(self.shape)}); nothing was saved under the final name"
                )
            reached = stop


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
                    "fragments": [fragment.to_list() for fragment in entry.fragments],
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
        if body.get("version") not in READABLE:
            raise CorruptCheckpointError(
                f"{path}: format version {body.get('version')} found, this release reads "
                f"{' and '.join(map(str, READABLE))}; use the release that wrote it"
            )
        digest = body.pop("digest", None)
        if digest != _digest(body):
            raise CorruptCheckpointError(f"{path}: content does not match its digest {digest}")
        return cls(
            step=body["step"],
            training=body["training"],
            files=body["files"],
            tensors={key: _tensor_entry(entry) for key, entry in body["tensors"].items()},
            version=body["version"],
        )


def _tensor_entry(entry: dict[str, Any]) -> TensorEntry:
    # Version 1's fragments are version 2's without columns, so this reads both.
    shape = tuple(entry["shape"])
    return TensorEntry(shape, entry["dtype"], [FragmentEntry.from_list(f, prod(shape)) for f in entry["fragments"]])


def tensor_key(slot: str, name: str) -> str:
    """Key of a logical tensor in one slot."""
    return f"{slot}:{name}"


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, streamed in 8 MiB pieces."""
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(8 << 20):
            state.update(piece)
            PULSE.tick()
    return str(state.hexdigest())


def _digest(body: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode()))
