"""Spills: converted samples between reading them and writing them in shuffled order, one pair of files per piece.

``NAME.bin`` holds the samples one after the other, each a line of JSON (key-less: source, members, attributes) and
then its payloads. ``NAME.npz`` is the index, written last: who finds it knows that the piece is done.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline.errors import DamagedDataError
from data_pipeline.prepare.media.convert import Converted, merge_facts
from data_pipeline.prepare.metering import Drops
from data_pipeline.store import tar

INDEX = np.dtype(
    [
        ("order", "<u8", 2),  # where in the shuffle
        ("split", "<u8"),  # below a threshold: held out
        ("offset", "<u8"),
        ("head", "<u4"),  # bytes of the JSON line
        ("length", "<u8"),  # bytes of line and payloads
        ("stored", "<u8"),  # bytes in a tar
        ("payload", "<u8"),
        ("hash", "<u8"),  # xxh3 of line and payloads
    ]
)


def sample_keys(seed: int, source: str, content: bytes) -> tuple[bytes, int]:
    """(16 bytes that decide the place in the shuffle, a word that decides the split): pure functions of the seed and
    of what the sample is called, and what it is."""
    order = hashlib.blake2b(repr((seed, "order", source)).encode(), digest_size=16).digest()
    digest = hashlib.blake2b(repr((seed, "split")).encode() + xxhash.xxh3_128_digest(content), digest_size=8).digest()
    return order, int.from_bytes(digest, "little")


class SpillWriter:
    """Writes the samples of one piece to ``stream``."""

    def __init__(self, stream: BinaryIO, seed: int) -> None:
        self._stream, self._seed = stream, seed
        self._position = 0
        self._rows: list[tuple[Any, ...]] = []
        self.facts: dict[str, Any] = {}
        self.drops = Drops()

    def add(self, source: str, sample: Converted) -> None:
        """Write one sample."""
        order, split = sample_keys(self._seed, source, sample.content)
        described = [[extension, len(data), xxhash.xxh3_64_hexdigest(data)] for extension, data in sample.members]
        tree = {"members": described, "attributes": {**sample.attributes, "source": source}}
        head = json.dumps(tree, separators=(",", ":")).encode() + b"\n"
        digest = xxhash.xxh3_64(head)
        self._stream.write(head)
        for _, data in sample.members:
            self._stream.write(data)
            digest.update(data)
        payload = sum(len(data) for _, data in sample.members)
        stored = sum(tar.BLOCK + len(data) + tar.padding_after(len(data)) for _, data in sample.members)
        words = np.frombuffer(order, dtype=">u8")
        row = (words, split, self._position, len(head), len(head) + payload, stored, payload, digest.intdigest())
        self._rows.append(row)
        self._position += len(head) + payload
        self.facts = merge_facts(self.facts, sample.facts)

    def index(self) -> bytes:
        """The index file's bytes."""
        stream = io.BytesIO()
        tree = {"facts": self.facts, "drops": self.drops.to_json(), "bytes": self._position}
        about = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
        np.savez(stream, rows=np.array(self._rows, dtype=INDEX), about=about)
        return stream.getvalue()


def read_index(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(rows, what else is known of the piece) of an index file. Raises DamagedDataError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["rows"], json.loads(arrays["about"].tobytes())
    except (ValueError, KeyError, EOFError) as error:
        raise _damaged(path, f"not an index ({error})") from None


def read_spilled(stream: BinaryIO, path: Path, row: np.void) -> tuple[dict[str, Any], list[bytes]]:
    """(head, payloads) of one sample. Raises DamagedDataError when it is not what was written."""
    stream.seek(int(row["offset"]))
    data = stream.read(int(row["length"]))
    if len(data) != int(row["length"]) or xxhash.xxh3_64_intdigest(data) != int(row["hash"]):
        raise _damaged(path, f"byte {int(row['offset'])}: the sample there is not what was written")
    head: dict[str, Any] = json.loads(data[: int(row["head"])])
    payloads = []
    at = int(row["head"])
    for _, length, _ in head["members"]:
        payloads.append(data[at : at + length])
        at += length
    return head, payloads


def cut_shards(stored: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """(first, stop) of the samples of each shard: closed when it reaches ``shard_bytes``."""
    totals = np.cumsum(stored.astype(np.int64))
    cuts: list[tuple[int, int]] = []
    first = done = 0
    while first < len(totals):
        stop = min(int(np.searchsorted(totals, done + shard_bytes)) + 1, len(totals))
        cuts.append((first, stop))
        first, done = stop, int(totals[stop - 1])
    return cuts


def _damaged(path: Path, problem: str) -> DamagedDataError:
    return DamagedDataError(
        f"{path}: {problem}. What to do: remove this file and the .npz of the same name, and run the same command "
        "again; only what it held is done again.",
        shard=str(path),
    )


def merged_facts(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all pieces."""
    facts: dict[str, Any] = {}
    for about in abouts:
        facts = merge_facts(facts, about["facts"])
    return facts
