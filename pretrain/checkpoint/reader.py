"""Reading canonical checkpoints on any layout; needs torch and safetensors, no engine."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.checkpoint.manifest import CheckpointError, Manifest, tensor_key
from pretrain.checkpoint.writer import DTYPE_NAMES
from pretrain.parallel.canonical import canonical_buffers, canonical_parameters

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class CheckpointReader:
    """Random access to flat ranges of the logical tensors of one checkpoint folder (memory-mapped)."""

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

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Flat elements ``[start, stop)`` of a logical tensor, 1-D, in the stored dtype."""
        entry = self.manifest.tensors[tensor_key(slot, name)]
        assert 0 <= start <= stop <= prod(entry.shape), f"{name}: range {start}..{stop} of shape {entry.shape}"
        result = torch.empty(stop - start, dtype=_DTYPES[entry.dtype])
        for fragment in entry.fragments:
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if low < high:
                stored = self._file(fragment.file).get_slice(f"{tensor_key(slot, name)}:{fragment.start}")
                result[low - start : high - start] = stored[low - fragment.start : high - fragment.start]
        return result

    def tensor(self, name: str, slot: str) -> Tensor:
        """A whole logical tensor in its logical shape."""
        shape = self.shape(name, slot)
        return self.read(name, slot, 0, prod(shape)).reshape(shape)

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.folder / name, framework="pt")
        return self._open_files[name]


def weight_slot(reader: CheckpointReader, name: str) -> str:
    """Slot that holds a parameter's value: the FP32 master where there is one."""
    return "master" if reader.has(name, "master") else "weight"


def check_model(model: nn.Module, reader: CheckpointReader) -> None:
    """Raise ``CheckpointError`` listing every missing, unexpected or differently shaped logical tensor."""
    expected = {part.name: part.shape for p in canonical_parameters(model) for part in p.parts}
    stored = {name: reader.shape(name, slot) for slot in ("weight", "master") for name in reader.names(slot)}
    faults = [
        *(f"{name}: missing in the checkpoint" for name in sorted(expected.keys() - stored.keys())),
        *(f"{name}: not in the model" for name in sorted(stored.keys() - expected.keys())),
        *(
            f"{name}: shape {list(stored[name])} in the checkpoint, {list(expected[name])} in the model"
            for name in sorted(expected.keys() & stored.keys())
            if tuple(stored[name]) != tuple(expected[name])
        ),
    ]
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(
            f"{reader.folder} holds another model than the configuration describes:\n  {shown}\n"
            "Use the run directory's own configuration (`pretrain resume RUN_DIR`), or start a new run."
        )


@torch.no_grad()
def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Copy weights (and persistent buffers) into ``model``, converting to each parameter's dtype and device.

    Raises:
        CheckpointError: the checkpoint holds another model.
    """
    check_model(model, reader)
    for parameter in canonical_parameters(model):
        flat = parameter.tensor.data.view(-1)
        for part in parameter.parts:
            values = reader.read(part.name, weight_slot(reader, part.name), 0, part.stop - part.start)
            flat[part.start : part.stop].copy_(values)
    for name, buffer in canonical_buffers(model):
        if reader.has(name, "buffer"):
            buffer.copy_(reader.tensor(name, "buffer"))
