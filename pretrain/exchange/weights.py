"""Weights in a folder of Hugging Face's: one safetensors file, or several with an index. Mapped, not loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.manifest import CorruptCheckpointError
from pretrain.exchange.architecture import ExchangeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "BF16", "F16")
"""Each value of these is a value of FP32."""


class ForeignWeights:
    """The tensors of a folder by name.

    Attributes:
        shapes, dtypes: of each tensor, from the headers of the files.

    Raises:
        ExchangeError: there are no safetensors files, or the index is not one.
        CorruptCheckpointError: listing every file that is missing or damaged, and every tensor that the index names
            and its file lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Any] = {}
        index = self._index()
        faults: list[str] = []
        for file in sorted(set(index.values())) if index is not None else [SINGLE_FILE]:
            wanted = None if index is None else {name for name, place in index.items() if place == file}
            faults += self._open(file, wanted)
        if faults:
            raise CorruptCheckpointError(
                f"{folder} is damaged; copy or download it again:\n" + "\n".join(f"  {fault}" for fault in faults)
            )

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        try:
            tensor: Tensor = self._file_of[name].get_tensor(name)
        except SafetensorError as error:
            raise CorruptCheckpointError(
                f"{self.folder}: {name} cannot be read: {error}; copy or download it again"
            ) from error
        return tensor

    def _index(self) -> dict[str, str] | None:
        """File of each tensor; None where there is a single file."""
        path = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).is_file():
            return None
        if not path.is_file():
            found = sorted(file.name for file in self.folder.glob("*.bin"))
            hint = f"found {', '.join(found)}: save the model with safetensors first" if found else "found neither"
            raise ExchangeError(f"{self.folder}: expected {SINGLE_FILE} or {INDEX_FILE}; {hint}")
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{path} is no index of safetensors files: {error!r}; copy or download it again"
            ) from error

    def _open(self, file: str, wanted: set[str] | None) -> list[str]:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            return [f"{file}: missing"]
        try:
            opened = safe_open(path, framework="pt")
            names = list(opened.keys())
            headers = {name: opened.get_slice(name) for name in names}
        except (OSError, SafetensorError) as error:
            return [f"{file}: {error}"]
        for name, header in headers.items():
            self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), header.get_dtype()
            self._file_of[name] = opened
        lost = sorted((wanted or set()) - set(names))
        return [f"{file}: no tensor {name}, which {INDEX_FILE} expects there" for name in lost]
