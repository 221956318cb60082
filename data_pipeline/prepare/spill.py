"""Spills: what tokenising leaves for writing shards. One large file per run of documents, cut by bucket.

Layout, little-endian: magic; number of buckets (int64); one directory row per bucket and one at the end
(``DIRECTORY``: byte offset, documents, xxh3-64 of the segment); then the segments, each the rows of its
documents (``ROWS``) sorted by key, followed by their tokens in the same order. Reading one bucket takes two
reads, one of them of 48 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.prepare.encoding import Encoded

MAGIC = b"PTSPILL1"
_HEAD = len(MAGIC) + 8
ROWS = np.dtype([("key", "<u8"), ("digest", "<u8", 2), ("tokens", "<i8"), ("bytes", "<i8")])
"""Of one document: key of the order, xxh3-128 of its text, tokens with the frame, bytes of UTF-8."""
DIRECTORY = np.dtype([("offset", "<i8"), ("documents", "<i8"), ("hash", "<u8")])


@dataclass(frozen=True)
class Documents:
    """``rows`` (of dtype ``ROWS``) of some documents and their ``tokens`` joined in the same order."""

    rows: np.ndarray
    tokens: np.ndarray


class SpillBuffer:
    """Collects the encoded documents of one run in memory."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._rows: list[np.ndarray] = []
        self._buckets: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self.size = 0

    def add(self, rows: np.ndarray, buckets: np.ndarray, encoded: Encoded) -> None:
        """Add documents; ``buckets`` (int64) says where each goes."""
        self._rows.append(rows)
        self._buckets.append(buckets)
        self._tokens.append(encoded.tokens)
        self.size += encoded.tokens.nbytes + rows.nbytes

    def write(self, stream: BinaryIO, num_buckets: int) -> int:
        """Write the run, sorted, to ``stream``; returns its size in bytes."""
        rows, buckets = np.concatenate(self._rows), np.concatenate(self._buckets)
        order = np.lexsort((rows["digest"][:, 0], rows["key"], buckets))
        tokens = _slices(self._tokens, rows["tokens"])
        rows, buckets = rows[order], buckets[order]
        starts = np.searchsorted(buckets, np.arange(num_buckets + 1))
        directory = np.zeros(num_buckets + 1, dtype=DIRECTORY)
        position = _HEAD + directory.nbytes
        stream.write(bytes(position))
        for bucket in range(num_buckets):
            first, last = int(starts[bucket]), int(starts[bucket + 1])
            payload = b""
            if last > first:
                parts = [tokens[place] for place in order[first:last].tolist()]
                payload = rows[first:last].tobytes() + np.concatenate(parts).tobytes()
                stream.write(payload)
            directory[bucket] = (position, last - first, _hash(payload, last - first))
            position += len(payload)
        directory[-1] = (position, 0, 0)
        stream.seek(0)
        stream.write(MAGIC + num_buckets.to_bytes(8, "little") + directory.tobytes())
        return position


def read_bucket(path: Path, bucket: int, dtype: str) -> Documents:
    """The documents of one bucket of the spill at ``path``.

    Raises DamagedDataError when the spill is not what was written.
    """
    try:
        with open(path, "rb", buffering=0) as stream:
            where = _HEAD + bucket * DIRECTORY.itemsize
            entries = np.frombuffer(_read(stream, where, 2 * DIRECTORY.itemsize), dtype=DIRECTORY)
            start, stop, documents = (int(v) for v in (*entries["offset"], entries["documents"][0]))
            if not 0 <= start <= stop <= os.fstat(stream.fileno()).st_size:
                raise ValueError("its directory is damaged")
            payload = _read(stream, start, stop - start)
    except (OSError, ValueError) as error:
        raise _damaged(path, bucket, str(error)) from None
    cut = documents * ROWS.itemsize
    if _hash(payload, documents) != int(entries["hash"][0]) or cut > len(payload):
        raise _damaged(path, bucket, "its bytes do not match their xxh3 hash")
    return Documents(np.frombuffer(payload[:cut], dtype=ROWS), np.frombuffer(payload[cut:], dtype=dtype))


def gather(parts: list[Documents], deduplicate: bool) -> tuple[np.ndarray, list[np.ndarray], int]:
    """(rows sorted by key, the tokens of each, duplicates left out) of the documents of one bucket.

    With ``deduplicate`` one of several equal documents stays; equal documents have equal keys then.
    """
    rows = np.concatenate([part.rows for part in parts])
    tokens = _slices([part.tokens for part in parts], rows["tokens"])
    # Equal keys are equal documents, or a collision that the digest decides: never the order of the parts.
    order = np.lexsort((rows["digest"][:, 1], rows["digest"][:, 0], rows["key"]))
    dropped = 0
    if deduplicate and len(order):
        digests = rows["digest"][order]
        repeated = np.concatenate(([False], (digests[1:] == digests[:-1]).all(axis=1)))
        order, dropped = order[~repeated], int(repeated.sum())
    return rows[order], [tokens[place] for place in order.tolist()], dropped


def _slices(groups: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """The tokens of each document, as views."""
    out: list[np.ndarray] = []
    ends = lengths.tolist()
    done = 0
    for group in groups:
        position = 0
        while position < len(group):
            end = position + ends[done]
            out.append(group[position:end])
            position, done = end, done + 1
    return out


def _hash(payload: bytes, documents: int) -> int:
    return int(xxhash.xxh3_64_intdigest(payload, seed=documents))


def _read(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start)
    parts = []
    while length:
        part = stream.read(length)
        if not part:
            raise ValueError("it is cut short")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _damaged(path: Path, bucket: int, problem: str) -> DamagedDataError:
    return DamagedDataError(
        f"{path}: bucket {bucket}: {problem}. What to do: remove this file and run the same command again; only "
        "what it held is done again.",
        shard=str(path),
    )
