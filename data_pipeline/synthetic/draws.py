"""Random numbers for many rows at once, each row's a pure function of a key and the row's number.

The generator is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): integer arithmetic modulo 2^64 on arrays, so the numbers
are the same everywhere and for any set of rows asked for together.

R = rows, C = numbers for each row.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_LARGEST_SORTED = 8192  # integers that may be shuffled whole


def mixed(words: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, a bijection of 64-bit words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def sequence(states_R: np.ndarray, first: int, count: int) -> np.ndarray:
    """uint64 [R, count]: outputs number ``first``, ``first + 1``, ... of the generators with these seeds."""
    steps_C = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * _GAMMA
    return mixed(states_R[:, None] + steps_C)


def key_of(*parts: object) -> int:
    """64 bits of the parts' repr."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Draws:
    """Numbers of the rows ``numbers_R``; each call gives further ones.

    Attributes:
        valid_R: False for rows whose draws did not come out as asked (:meth:`distinct`), to be drawn again.
    """

    def __init__(self, key: int, numbers_R: np.ndarray, attempt: int = 0) -> None:
        rows_R = mixed(numbers_R.astype(np.uint64) + np.uint64(key))
        self._states_R = mixed(rows_R + np.uint64(attempt * int(_GAMMA) % (1 << 64)))
        self._count = 0
        self.valid_R = np.ones(len(numbers_R), dtype=bool)

    def words(self, count: int) -> np.ndarray:
        """uint64 [R, count], all values equally likely."""
        words_RC = sequence(self._states_R, self._count, count)
        self._count += count
        return words_RC

    def below(self, limit: int, count: int) -> np.ndarray:
        """int64 [R, count] in [0, limit), equally likely to 2^-32; ``limit`` is at most 2^32."""
        assert 0 < limit <= 1 << 32
        high = self.words(count) >> np.uint64(32)
        return ((high * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)

    def distinct(self, limit: int, count: int) -> np.ndarray:
        """int64 [R, count]: different integers in [0, limit) in random order.

        Where ``limit`` is large, rows with equal integers are marked as not valid.
        """
        assert count <= limit
        if limit <= _LARGEST_SORTED:
            return np.argsort(self.words(limit), axis=1, kind="stable")[:, :count]
        numbers_RC = self.below(limit, count)
        in_order_RC = np.sort(numbers_RC, axis=1)
        self.valid_R &= (in_order_RC[:, 1:] != in_order_RC[:, :-1]).all(axis=1)
        return numbers_RC

    def distinct_weighted(self, weights_W: np.ndarray, count: int) -> np.ndarray:
        """int64 [R, count]: different indices of ``weights_W``, drawn one after the other without replacement.

        Exponential races (Efraimidis & Spirakis 2006): the order of -log(u) / w is that of such draws.
        """
        uniform_RW = ((self.words(len(weights_W)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return np.argsort(-np.log(uniform_RW) / weights_W, axis=1, kind="stable")[:, :count]


def most_distinct(limit: int, draws: int = 1) -> int:
    """How many different integers below ``limit`` :meth:`Draws.distinct` finds with few repetitions.

    ``draws`` are made for one row: all must come out. The chance is exp(-count^2 draws / (2 limit)), here exp(-2).
    """
    return limit if limit <= _LARGEST_SORTED else int((4 * limit / draws) ** 0.5)


def log2_permutations(limit: int, count: int) -> float:
    """log2 of how many ordered choices of ``count`` different integers below ``limit`` there are."""
    return sum(math.log2(limit - place) for place in range(count))
