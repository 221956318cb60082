"""Writing blocks of tokens as tar shards with sidecars."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline.prepare.tokenizer import Encoded
from data_pipeline.store import tar
from data_pipeline.store.arrays import npy_bytes
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION, sidecar_path


def open_shard(path: Path) -> BinaryIO:
    """Create a shard file; an existing one is an error."""
    return open(path, "xb")


class ShardWriter:
    """Writes the blocks of one split into ``folder`` and collects the manifest's shard entries.

    A shard is closed once it holds ``shard_bytes``. Members of block K are ``K.off.npy`` (int64 document
    offsets) and ``K.tok.npy``.
    """

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._stream: BinaryIO | None = None
        self._name = ""
        self._position = 0
        self._blocks: list[dict[str, Any]] = []
        self._num_blocks = 0

    def add_block(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Write one block of whole documents; raises OSError when the disk does."""
        if self._stream is None:
            self._name = f"{self._split}-{len(self.shards):06d}.tar"
            self._stream = open_shard(self._folder / self._name)
        key = f"{self._num_blocks:012d}"
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype("<i8")
        members = {
            OFFSETS_EXTENSION: self._add_member(f"{key}.{OFFSETS_EXTENSION}", npy_bytes(offsets)),
            TOKENS_EXTENSION: self._add_member(f"{key}.{TOKENS_EXTENSION}", npy_bytes(tokens)),
        }
        self._blocks.append(
            {
                "key": key,
                "tokens": len(tokens),
                "documents": len(lengths),
                "largest_id": int(tokens.max()),
                "members": members,
            }
        )
        self._num_blocks += 1
        if self._position >= self._shard_bytes:
            self._close_shard()

    def close(self) -> None:
        """Finish the last shard."""
        if self._stream is not None:
            self._close_shard()

    def abandon(self) -> None:
        """Close the file without finishing the shard."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _add_member(self, name: str, payload: bytes) -> dict[str, Any]:
        assert self._stream is not None
        padding = tar.padding_after(len(payload))
        self._stream.write(tar.member_header(name, len(payload)))
        self._stream.write(payload)
        self._stream.write(bytes(padding))
        offset = self._position + tar.BLOCK
        self._position = offset + len(payload) + padding
        return {"offset": offset, "length": len(payload), "xxh3": xxhash.xxh3_64_hexdigest(payload)}

    def _close_shard(self) -> None:
        assert self._stream is not None
        self._stream.write(tar.END_OF_ARCHIVE)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        size = self._position + len(tar.END_OF_ARCHIVE)
        sidecar = json.dumps({"shard": self._name, "size": size, "blocks": self._blocks}, indent=1).encode()
        write_synced(sidecar_path(self._folder, self._name), sidecar)
        self.shards.append(
            {
                "name": self._name,
                "size": size,
                "blocks": len(self._blocks),
                "documents": sum(block["documents"] for block in self._blocks),
                "tokens": sum(block["tokens"] for block in self._blocks),
                "largest_id": max(block["largest_id"] for block in self._blocks),
                "sidecar_hash": hashlib.blake2b(sidecar, digest_size=16).hexdigest(),
            }
        )
        self._position, self._blocks = 0, []


def write_blocks(encoded: Iterable[Encoded], writer: ShardWriter, block_tokens: int) -> None:
    """Cut a stream of documents into blocks of whole documents, each of at least ``block_tokens`` but the
    last.

    Where blocks end depends on the documents alone, not on how the stream is grouped.
    """
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    total = 0
    for group in encoded:
        start = 0
        for length in group.lengths.tolist():
            tokens.append(group.tokens[start : start + length])
            lengths.append(length)
            start += length
            total += length
            if total >= block_tokens:
                writer.add_block(np.concatenate(tokens), np.array(lengths))
                tokens, lengths, total = [], [], 0
    if lengths:
        writer.add_block(np.concatenate(tokens), np.array(lengths))


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
