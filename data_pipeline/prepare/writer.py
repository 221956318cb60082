"""Writing blocks of tokens as tar shards with sidecars."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline.store import tar
from data_pipeline.store.arrays import npy_bytes
from data_pipeline.store.manifest import OFFSETS_EXTENSION, TOKENS_EXTENSION

_BLOCKS_PER_SHARD = 10**6
KEY_PREFIXES = {"train": "", "validation": "v"}
"""What keys of a split begin with."""


class ShardWriter:
    """Writes the blocks of one shard to ``stream``.

    Members of block K are ``K.off.npy`` (int64 document offsets) and ``K.tok.npy``. K is ``number`` of the
    shard and of the block in it, six digits each, after ``prefix``, which tells splits apart: no two blocks of
    a dataset share a key, which some readers insist on.
    """

    def __init__(self, stream: BinaryIO, name: str, number: int, prefix: str = "") -> None:
        self._stream, self._name, self._number, self._prefix = stream, name, number, prefix
        self._position = 0
        self._bytes = 0
        self._blocks: list[dict[str, Any]] = []

    def add_block(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Write one block of whole documents with ``num_bytes`` of UTF-8; raises OSError when the disk does."""
        assert len(self._blocks) < _BLOCKS_PER_SHARD
        key = f"{self._prefix}{self._number:06d}{len(self._blocks):06d}"
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype("<i8")
        members = {
            OFFSETS_EXTENSION: self._add_member(f"{key}.{OFFSETS_EXTENSION}", npy_bytes(offsets)),
            TOKENS_EXTENSION: self._add_member(f"{key}.{TOKENS_EXTENSION}", npy_bytes(tokens)),
        }
        self._bytes += num_bytes
        self._blocks.append(
            {
                "key": key,
                "tokens": len(tokens),
                "documents": len(lengths),
                "largest_id": int(tokens.max()),
                "members": members,
            }
        )

    def finish(self) -> tuple[dict[str, Any], bytes]:
        """Write the end of the archive; returns the shard's entry in the manifest and its sidecar."""
        self._stream.write(tar.END_OF_ARCHIVE)
        size = self._position + len(tar.END_OF_ARCHIVE)
        sidecar = json.dumps({"shard": self._name, "size": size, "blocks": self._blocks}, indent=1).encode()
        entry = {
            "name": self._name,
            "size": size,
            "blocks": len(self._blocks),
            "documents": sum(block["documents"] for block in self._blocks),
            "tokens": sum(block["tokens"] for block in self._blocks),
            "bytes": self._bytes,
            "largest_id": max(block["largest_id"] for block in self._blocks),
            "sidecar_hash": hashlib.blake2b(sidecar, digest_size=16).hexdigest(),
        }
        return entry, sidecar

    def _add_member(self, name: str, payload: bytes) -> dict[str, Any]:
        padding = tar.padding_after(len(payload))
        self._stream.write(tar.member_header(name, len(payload)))
        self._stream.write(payload)
        self._stream.write(bytes(padding))
        offset = self._position + tar.BLOCK
        self._position = offset + len(payload) + padding
        return {"offset": offset, "length": len(payload), "xxh3": xxhash.xxh3_64_hexdigest(payload)}


def block_ends(lengths: np.ndarray, block_tokens: int) -> list[int]:
    """Where to cut documents of ``lengths`` tokens into blocks of whole documents, each of at least
    ``block_tokens`` but the last: the index after the last document of each block."""
    totals = np.cumsum(lengths)
    ends: list[int] = []
    done = 0
    while not ends or ends[-1] < len(lengths):
        end = int(np.searchsorted(totals, done + block_tokens)) + 1
        ends.append(min(end, len(lengths)))
        done = int(totals[ends[-1] - 1])
    return ends


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
