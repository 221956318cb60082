"""One rank's safetensors file: streamed straight from fragments, or from a snapshot of them in host memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import FragmentEntry, tensor_key
from pretrain.parallel.pulse import PULSE

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
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_CHUNK_BYTES = 32 << 20


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its name there, safetensors dtype name and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Piece:
    """What the manifest needs to know of a fragment that lies in a rank file."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    entry: FragmentEntry

    @classmethod
    def of(cls, fragment: Fragment, file: str) -> Piece:
        entry = FragmentEntry.of(file, fragment.start, fragment.start + fragment.numel, fragment.shard)
        return cls(tensor_key(fragment.slot, fragment.name), fragment.shape, DTYPE_NAMES[fragment.dtype], entry)

    @property
    def stored(self) -> StoredTensor:
        return StoredTensor(self.entry.key(self.tensor), self.dtype, (self.entry.stop - self.entry.start,))


def write_safetensors(
    path: Path, tensors: Sequence[StoredTensor], data: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write a safetensors file and fsync it; ``data`` yields the bytes of ``tensors`` in order, in any portions.

    Written here rather than with ``safetensors.torch.save_file`` because that wants every tensor in host memory at
    once. Returns ``{"bytes", "xxh3"}`` of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        assert tensor.key not in header, f"{tensor.key} written twice into one file"
        end = offset + tensor.num_bytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state = xxhash.xxh3_128()
    with path.open("wb") as stream:
        _put(stream, state, len(text).to_bytes(8, "little") + text)
        for portion in data:
            _put(stream, state, portion.numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    assert size == 8 + len(text) + offset, f"{path.name}: {size} bytes written, header says {8 + len(text) + offset}"
    return {"bytes": size, "xxh3": state.hexdigest()}


def _put(stream: BinaryIO, state: Any, data: Any) -> None:
    stream.write(data)
    state.update(data)
    PULSE.tick()


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor, 1-D, where it lies."""
    flat = values.detach().reshape(-1).contiguous()
    # A single element counts as contiguous with any stride, but is seen as bytes only with stride 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def write_rank_file(path: Path, fragments: Iterable[Fragment]) -> tuple[dict[str, Any], list[Piece]]:
    """Stream fragments into one file, one host copy at a time; returns bytes and hash, and what the file holds.

    All fragments are asked for before the first is written, because the header comes first: cheap as long as their
    values are views of the engine's storage.
    """
    kept = list(_not_empty(fragments))
    pieces = [Piece.of(fragment, path.name) for fragment in kept]
    portions = (as_bytes(fragment.values).to("cpu") for fragment in kept)
    return write_safetensors(path, [piece.stored for piece in pieces], portions), pieces


@dataclass
class HostMemory:
    """Host memory for snapshots, kept from one save to the next: as much as one rank's fragments, in whole chunks.

    Pinned where the values lie on CUDA. The bytes of a snapshot are those of its file, one after the other, so that
    chunks need not know where tensors begin; and a fragment may be dropped as soon as it is copied.
    """

    chunks: list[Tensor] = field(default_factory=list)

    def take(self, fragments: Iterable[Fragment], file: str) -> Snapshot:
        """Copy all fragments; when it returns their storage may change. Overwrites the snapshot before."""
        pieces, used, on_device = [], 0, False
        for fragment in _not_empty(fragments):
            pieces.append(Piece.of(fragment, file))
            source = as_bytes(fragment.values)
            on_device |= source.is_cuda
            for portion in _cut(source, used):
                index, offset = divmod(used, _CHUNK_BYTES)
                if index == len(self.chunks):
                    self.chunks.append(torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=source.is_cuda))
                self.chunks[index][offset : offset + portion.numel()].copy_(portion, non_blocking=True)
                used += portion.numel()
        if on_device:
            torch.cuda.synchronize()
        return Snapshot(pieces, self.chunks, used)


@dataclass(frozen=True)
class Snapshot:
    """Fragments of one moment as the first ``num_bytes`` bytes of ``chunks``."""

    pieces: list[Piece]
    chunks: list[Tensor]
    num_bytes: int

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file that :func:`write_rank_file` would have written; returns its bytes and hash."""
        return write_safetensors(path, [piece.stored for piece in self.pieces], self._portions())

    def _portions(self) -> Iterator[Tensor]:
        for number, chunk in enumerate(self.chunks):
            left = self.num_bytes - number * _CHUNK_BYTES
            if left > 0:
                yield chunk[:left]


def _not_empty(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    # A rank whose flat partition ends at a tensor's edge may export a piece without elements.
    return (fragment for fragment in fragments if fragment.numel or not prod(fragment.shape))


def _cut(source: Tensor, used: int) -> Iterator[Tensor]:
    """``source`` in portions that fit the chunks when ``used`` bytes are taken already."""
    first = -used % _CHUNK_BYTES
    if first:
        yield source[:first]
    yield from source[first:].split(_CHUNK_BYTES)
