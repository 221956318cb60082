"""What every contender shares: the shape of the work, and reading the prepared data set with standard tools only.

The work: rows of 2,049 tokens (2,048 positions and the next token), 8 rows in a batch, shuffled, as a torch tensor of
int32 or int64 in the training process. Imports NumPy only, so that any environment can use it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

SEQUENCE_LENGTH = 2048
ROW = SEQUENCE_LENGTH + 1
BATCH_ROWS = 8
SEED = 17


def shards(dataset: Path, split: str = "train") -> list[Path]:
    """Shards of one split of a prepared data set, in order."""
    return sorted(dataset.glob(f"{split}-*.tar"))


def npy_view(payload: bytes) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file (version 1, one dimension), without copying it."""
    length = int.from_bytes(payload[8:10], "little")
    header = payload[10 : 10 + length].decode("latin1")
    dtype = header.split("'descr':")[1].split("'")[1]
    return np.frombuffer(payload, dtype=dtype, offset=10 + length)


def blocks(dataset: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document offsets) of every block of the training split, in stored order, read with ``tarfile``."""
    for shard in shards(dataset):
        with tarfile.open(shard) as archive:
            parts: dict[str, dict[str, np.ndarray]] = {}
            for member in archive:
                key, _, extension = member.name.partition(".")
                stream = archive.extractfile(member)
                assert stream is not None
                parts.setdefault(key, {})[extension] = npy_view(stream.read())
                if len(parts[key]) == 2:
                    block = parts.pop(key)
                    yield block["tok.npy"], block["off.npy"]


def documents(dataset: Path) -> Iterator[np.ndarray]:
    """Tokens of every training document, in stored order (a global shuffle of the corpus)."""
    for tokens, offsets in blocks(dataset):
        for start, stop in pairwise(offsets.tolist()):
            yield tokens[start:stop]


def cut_into_batches(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Concatenate and cut: int32 batches [8, 2049]; the rest at the end is dropped."""
    batch = np.empty(BATCH_ROWS * ROW, dtype=np.int32)
    filled = 0
    for piece in pieces:
        while len(piece):
            taken = min(len(piece), len(batch) - filled)
            batch[filled : filled + taken] = piece[:taken]
            filled += taken
            piece = piece[taken:]
            if filled == len(batch):
                yield batch.reshape(BATCH_ROWS, ROW)
                batch, filled = np.empty(BATCH_ROWS * ROW, dtype=np.int32), 0


def shuffled_rows(pieces: Iterable[np.ndarray], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Cut each piece (a block of many rows) into rows, permute them, yield int32 batches [8, 2049].

    Tokens and rows that are left over join the next block.
    """
    rest = np.empty(0, dtype=np.uint16)
    for piece in pieces:
        if len(rest):
            piece = np.concatenate((rest, piece))
        usable = len(piece) // (BATCH_ROWS * ROW) * BATCH_ROWS
        rows, rest = piece[: usable * ROW].reshape(usable, ROW), piece[usable * ROW :]
        order = generator.permutation(usable)
        for start in range(0, usable, BATCH_ROWS):
            yield rows[order[start : start + BATCH_ROWS]].astype(np.int32)


def fresh_folder(out: Path) -> Path:
    """Create ``out`` for one conversion; what an interrupted one left is removed."""
    import shutil

    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    return out


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(os.path.getsize(Path(root) / name) for root, _, names in os.walk(folder) for name in names)
