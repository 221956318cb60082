"""Memory for batches, used again once nobody holds the batch that it was given to."""

from __future__ import annotations

import sys
from collections import deque

import numpy as np

# The deque, the local variable and the argument of getrefcount.
_OWN_REFERENCES = 3
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

    def take(self) -> np.ndarray:
        """An array that is the caller's for as long as anything refers to it."""
        if self._arrays:
            array = self._arrays[0]
            if sys.getrefcount(array) == _OWN_REFERENCES:
                self._arrays.rotate(-1)
                return array
        array = np.empty(self.shape, dtype=self._dtype)
        if len(self._arrays) < _MOST_ARRAYS:
            self._arrays.append(array)
        return array
