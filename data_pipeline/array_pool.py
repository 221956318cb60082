"""Memory for batches, used again once nobody holds the batch that it was given to."""

from __future__ import annotations

import sys
from collections import deque

import numpy as np

_MOST_ARRAYS = 1024


class ArrayPool:
    """Gives arrays of one shape and dtype, with any content.

    A batch that is made in one thread and dropped in another goes back to the system page by page, and fresh pages cost
    more than what is written to them. Arrays are handed out in turn and dropped in about the same order, so only the
    one that was given out longest ago is looked at: it is free when no view, batch or tensor refers to it any more.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self._dtype = shape, dtype
        self._arrays: deque[np.ndarray] = deque()
        # Python versions count the references of a call differently: what a free array has is measured.
        self._free = _references(deque([np.empty(0, dtype)]))

    def take(self) -> np.ndarray:
        """An array that is the caller's for as long as anything refers to it."""
        if self._arrays and _references(self._arrays) == self._free:
            self._arrays.rotate(-1)
            return self._arrays[-1]
        array = np.empty(self.shape, dtype=self._dtype)
        if len(self._arrays) < _MOST_ARRAYS:
            self._arrays.append(array)
        return array


def _references(arrays: deque[np.ndarray]) -> int:
    """References to the first of ``arrays``, those of this call included."""
    return sys.getrefcount(arrays[0])
