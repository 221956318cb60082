"""Reading blocks of a prepared dataset, with every byte that is used checked first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.store import tar
from data_pipeline.store.arrays import parse_npy
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION, Block, Manifest


@dataclass(frozen=True)
class BlockArrays:
    """``tokens`` [T] and ``offsets`` [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray


class BlockReader:
    """Reads ``blocks``. Holds no file open between calls, so it may be used from any thread or process."""

    def __init__(self, manifest: Manifest, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._folder = manifest.folder
        self._dtype = manifest.dtype
        self._vocab_size = manifest.vocab_size

    def lengths(self, index: int) -> np.ndarray:
        """Tokens per document (int64) of block ``index``; reads only its offsets.

        Raises DamagedDataError.
        """
        block = self.blocks[index]
        with open(self._folder / block.shard, "rb") as stream:
            return np.diff(self._offsets(stream, block))

    def read(self, index: int) -> BlockArrays:
        """Both arrays of block ``index``.

        Raises DamagedDataError, naming shard, member and remedy, when header, hash, dtype, offsets or ids are
        wrong.
        """
        block = self.blocks[index]
        with open(self._folder / block.shard, "rb") as stream:
            tokens = self._array(stream, block, TOKENS_EXTENSION, self._dtype)
            offsets = self._offsets(stream, block)
        problem = None
        if len(tokens) != block.tokens:
            problem = f"{len(tokens)} tokens, the sidecar says {block.tokens}"
        elif len(tokens) and int(tokens.max()) >= self._vocab_size:
            problem = f"token id {int(tokens.max())} is outside the vocabulary of {self._vocab_size}"
        if problem:
            raise _damaged(self._folder / block.shard, block, TOKENS_EXTENSION, problem)
        return BlockArrays(tokens, offsets)

    def _offsets(self, stream: BinaryIO, block: Block) -> np.ndarray:
        offsets = self._array(stream, block, OFFSETS_EXTENSION, "<i8")
        ends_match = len(offsets) == block.documents + 1 and offsets[0] == 0 and offsets[-1] == block.tokens
        if not ends_match or bool((np.diff(offsets) <= 0).any()):
            problem = f"document offsets do not rise from 0 to {block.tokens} in {block.documents} steps"
            raise _damaged(self._folder / block.shard, block, OFFSETS_EXTENSION, problem)
        return offsets

    def _array(self, stream: BinaryIO, block: Block, extension: str, dtype: str) -> np.ndarray:
        payload = read_member(stream, self._folder / block.shard, block, extension)
        try:
            array = parse_npy(payload)
            if array.dtype.str != dtype:
                raise ValueError(f"dtype {array.dtype.str} instead of {dtype}")
        except ValueError as error:
            raise _damaged(self._folder / block.shard, block, extension, str(error)) from None
        return array


def read_member(stream: BinaryIO, shard: Path, block: Block, extension: str) -> bytes:
    """Payload of one member of ``block``, after checking its tar header and its xxh3 hash.

    Raises DamagedDataError.
    """
    entry = block.members[extension]
    name = f"{block.key}.{extension}"
    stream.seek(entry["offset"] - tar.BLOCK)
    header = stream.read(tar.BLOCK)
    found = tar.parse_header(shard, header, entry["offset"] - tar.BLOCK)
    if (found.name, found.length) != (name, entry["length"]):
        raise tar.damaged(
            shard,
            entry["offset"] - tar.BLOCK,
            f"found member {found.name!r} of {found.length} bytes, the sidecar says {name!r} of {entry['length']}",
        )
    payload = stream.read(entry["length"])
    if len(payload) != entry["length"]:
        raise _damaged(shard, block, extension, f"{len(payload)} of {entry['length']} bytes present")
    if xxhash.xxh3_64_hexdigest(payload) != entry["xxh3"]:
        raise _damaged(shard, block, extension, "its bytes do not match their xxh3 hash in the sidecar")
    return payload


def _damaged(shard: Path, block: Block, extension: str, problem: str) -> DamagedDataError:
    name = f"{block.key}.{extension}"
    return tar.damaged(shard, block.members[extension]["offset"], f"member {name}: {problem}")
