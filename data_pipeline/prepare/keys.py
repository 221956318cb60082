"""Keys of documents: what decides their order and their split, and nothing else does.

Every key is a pure function of the seed and the document (its content or its place in the input), so that the
shuffle is the same however the work is cut up and whoever does it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import xxhash

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def content_digests(documents: Sequence[bytes]) -> np.ndarray:
    """xxh3-128 of each document's UTF-8 bytes as two words: uint64 ``[documents, 2]``."""
    joined = b"".join(map(xxhash.xxh3_128_digest, documents))
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def content_keys(digests: np.ndarray, *key: object) -> np.ndarray:
    """A uniform uint64 for each row of ``digests``, keyed by ``key``; equal documents have equal keys."""
    first, second = _words(key)
    return _mix(_mix(digests[:, 0] ^ first) + (digests[:, 1] ^ second))


def place_keys(offsets: np.ndarray, *key: object) -> np.ndarray:
    """A uniform uint64 for each place ``offsets`` (int64) within the file that ``key`` names.

    No two places of one file share a key: each step is a bijection.
    """
    first, second = _words(key)
    return _mix(_mix(offsets.astype(np.uint64) ^ first) + second)


def below(keys: np.ndarray, threshold: int) -> np.ndarray:
    """Which keys are smaller than ``threshold`` (0 to 2^64)."""
    return np.ones(len(keys), dtype=bool) if threshold >> 64 else keys < np.uint64(threshold)


def buckets(keys: np.ndarray, count: int) -> np.ndarray:
    """Which of ``count`` equal ranges of the keys each key falls in (int64); rises with the key."""
    return (((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def _words(key: tuple[object, ...]) -> tuple[np.uint64, np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    first, second = np.frombuffer(digest, dtype="<u8")
    return first, second


def _mix(words: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection of 64-bit words."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
