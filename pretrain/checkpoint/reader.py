"""Reading canonical checkpoints on any layout; needs torch and safetensors, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.checkpoint.manifest import CheckpointError, CorruptCheckpointError, FragmentEntry, Manifest, tensor_key
from pretrain.checkpoint.rank_file import DTYPES
from pretrain.parallel.canonical import canonical_buffers, canonical_parameters
from pretrain.parallel.pulse import PULSE
from pretrain.parallel.shard import Shard


@dataclass(frozen=True)
class _Block:
    """``rows`` x ``width`` elements: dense in a shard from ``local`` on, ``stride`` apart in the tensor at ``flat``."""

    local: int
    flat: int
    rows: int
    width: int
    stride: int


def _local(shard: Shard, flat: int) -> int:
    """Number of the shard's elements that lie before position ``flat`` of the tensor."""
    row, column = divmod(flat, shard.row_length)
    return row * shard.width + min(max(column - shard.start, 0), shard.width)


def _blocks(shard: Shard, start: int, stop: int) -> list[_Block]:
    """Elements ``[start, stop)`` of a shard as at most three blocks: the rest of a row, whole rows, part of a row."""
    blocks = []
    while start < stop:
        column = start % shard.width
        rows = (stop - start) // shard.width if column == 0 else 0
        width = shard.width if rows else min(shard.width - column, stop - start)
        blocks.append(_Block(start, shard.flat_index(start), max(rows, 1), width, shard.row_length))
        start += max(rows, 1) * width
    return blocks


class CheckpointReader:
    """Random access to the logical tensors of one checkpoint folder, memory-mapped: only what is read is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._open_files: dict[str, Any] = {}

    @property
    def training(self) -> dict[str, Any]:
        return self.manifest.training

    def has(self, name: str, slot: str) -> bool:
        return tensor_key(slot, name) in self.manifest.tensors

    def names(self, slot: str) -> list[str]:
        prefix = f"{slot}:"
        return [key[len(prefix) :] for key in self.manifest.tensors if key.startswith(prefix)]

    def slots(self) -> list[str]:
        return sorted({key.split(":", 1)[0] for key in self.manifest.tensors})

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        return self.manifest.tensors[tensor_key(slot, name)].shape

    def dtype(self, name: str, slot: str) -> torch.dtype:
        return DTYPES[self.manifest.tensors[tensor_key(slot, name)].dtype]

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Flat elements ``[start, stop)`` of a logical tensor, 1-D, in the stored dtype."""
        entry = self.manifest.tensors[tensor_key(slot, name)]
        assert 0 <= start <= stop <= prod(entry.shape), f"{name}: range {start}..{stop} of shape {entry.shape}"
        result = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        whole = Shard.whole(entry.shape)
        for fragment in entry.fragments:
            shard = fragment.shard or whole
            low, high = start, stop
            if fragment.shard:
                low, high = _local(shard, start), _local(shard, stop)
            low, high = max(low, fragment.start), min(high, fragment.stop)
            if low >= high:
                continue
            stored = self._stored(fragment, name, slot)
            for block in _blocks(shard, low, high):
                piece = stored[block.local - fragment.start :][: block.rows * block.width]
                _strided(result, start, block).copy_(piece.view(block.rows, block.width))
        return result

    def read_shard(self, name: str, slot: str, shard: Shard, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of a shard in its own row-major order, 1-D, in the stored dtype.

        The checkpoint may be split in any other way. Memory: the result; and, where both are split along columns but
        differently, the rows of the tensor between the first and the last wanted element.
        """
        if shard.is_contiguous:
            offset = shard.start if shard.num_rows == 1 else 0
            return self.read(name, slot, offset + start, offset + stop)
        assert 0 <= start <= stop <= shard.numel, f"{name}: range {start}..{stop} of {shard}"
        entry = self.manifest.tensors[tensor_key(slot, name)]
        result = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        if start == stop:
            return result
        same = [fragment for fragment in entry.fragments if fragment.shard == shard]
        flat = [fragment for fragment in entry.fragments if fragment.shard is None]
        for fragment in same:
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if low < high:
                stored = self._stored(fragment, name, slot)
                result[low - start : high - start] = stored[low - fragment.start : high - fragment.start]
        for fragment in flat:
            low, high = max(start, _local(shard, fragment.start)), min(stop, _local(shard, fragment.stop))
            if low < high:
                stored = self._stored(fragment, name, slot)
                _pick(result[low - start : high - start], stored, fragment.start, _blocks(shard, low, high))
        if not same and not flat:
            first, last = shard.flat_index(start), shard.flat_index(stop - 1)
            band = self.read(name, slot, first, last + 1)
            _pick(result, band, first, _blocks(shard, start, stop))
        return result

    def tensor(self, name: str, slot: str) -> Tensor:
        """A whole logical tensor in its logical shape."""
        shape = self.shape(name, slot)
        return self.read(name, slot, 0, prod(shape)).reshape(shape)

    def _stored(self, fragment: FragmentEntry, name: str, slot: str) -> Tensor:
        """All elements of a fragment, as a view of its mapped file."""
        key = fragment.key(tensor_key(slot, name))
        path = self.folder / fragment.file
        try:
            if fragment.file not in self._open_files:
                self._open_files[fragment.file] = safe_open(path, framework="pt")
            stored: Tensor = self._open_files[fragment.file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CorruptCheckpointError(f"{path} does not hold {key}, as the manifest says: {error}") from error
        if stored.numel() != fragment.stop - fragment.start:
            raise CorruptCheckpointError(
                f"{path}: {key} has {stored.numel()} elements, expected {fragment.stop - fragment.start}"
            )
        PULSE.tick()
        return stored


def _strided(flat: Tensor, first: int, block: _Block) -> Tensor:
    """The elements of ``block`` in ``flat``, which holds the tensor's elements from ``first`` on."""
    offset = flat.storage_offset() + block.flat - first
    return flat.as_strided((block.rows, block.width), (block.stride, 1), offset)


def _pick(result: Tensor, flat: Tensor, first: int, blocks: list[_Block]) -> None:
    """Fill ``result`` with the elements of ``blocks``, taken from ``flat``."""
    for block in blocks:
        dense = result[block.local - blocks[0].local :][: block.rows * block.width]
        dense.view(block.rows, block.width).copy_(_strided(flat, first, block))


def weight_slot(reader: CheckpointReader, name: str) -> str:
    """Slot that holds a parameter's value: the FP32 master where there is one."""
    return "master" if reader.has(name, "master") else "weight"


def check_model(model: nn.Module, reader: CheckpointReader, *, partial: bool = False) -> None:
    """Raise ``CheckpointError`` listing every missing, unexpected or differently shaped logical tensor.

    Shapes are those of whole logical tensors, whatever share of them the model holds. A ``partial`` model (one stage
    of a pipeline) need not know all that is stored.
    """
    expected = {part.name: part.shape for p in canonical_parameters(model) for part in p.parts}
    stored = {name: reader.shape(name, slot) for slot in ("weight", "master") for name in reader.names(slot)}
    surplus = [] if partial else sorted(stored.keys() - expected.keys())
    faults = [
        *(f"{name}: missing in the checkpoint" for name in sorted(expected.keys() - stored.keys())),
        *(f"{name}: not in the model" for name in surplus),
        *(
            f"{name}: shape {list(stored[name])} in the checkpoint, {list(expected[name])} in the model"
            for name in sorted(expected.keys() & stored.keys())
            if tuple(stored[name]) != tuple(expected[name])
        ),
    ]
    if faults:
        shown = "\n  ".join(faults)
        raise CheckpointError(
            f"{reader.folder} holds another model than the configuration describes:\n  {shown}\n"
            "Use the run directory's own configuration (`pretrain resume RUN_DIR`), or start a new run."
        )


@torch.no_grad()
def load_weights(model: nn.Module, reader: CheckpointReader, *, partial: bool = False) -> None:
    """Copy weights (and persistent buffers) into ``model``, converting to each parameter's dtype and device.

    Of a split parameter the model's own share is read. ``partial``: see :func:`check_model`.

    Raises:
        CheckpointError: the checkpoint holds another model.
    """
    check_model(model, reader, partial=partial)
    for parameter in canonical_parameters(model):
        flat = parameter.tensor.data.view(-1)
        for part in parameter.parts:
            slot = weight_slot(reader, part.name)
            flat[part.start : part.stop].copy_(reader.read_shard(part.name, slot, part.shard, 0, part.shard.numel))
    for name, buffer in canonical_buffers(model):
        if reader.has(name, "buffer"):
            buffer.copy_(reader.tensor(name, "buffer"))
