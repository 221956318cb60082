"""Permutations that are pure functions of a key."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of ``range(count)`` (int64) that depends on ``count`` and ``key`` alone.

    Sorts the raw 64-bit words of Philox-4x64 (Salmon et al., SC 2011) keyed by a blake2b hash of ``key``'s
    repr. The raw stream of a NumPy bit generator is fixed for good, whereas ``Generator.permutation`` may
    change between versions (NEP 19), which would silently reorder a resumed run.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(words, kind="stable")
