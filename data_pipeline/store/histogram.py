"""Histograms with bins that double, as numbers and as bars of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_EIGHTHS = " ▏▎▍▌▋▊▉"
_BAR_WIDTH = 40


def histogram(values: np.ndarray, unit: str) -> dict[str, Any]:
    """Counts of whole ``values`` >= 0 in bins 0, 1, 2-3, 4-7, 8-15, ..., from the first to the last that is not
    empty: ``edges`` (each bin's first value, and the end), ``counts``, ``number``, ``mean``, ``median``,
    ``smallest``, ``largest``."""
    values = np.asarray(values, dtype=np.int64)
    if not len(values):
        return {"unit": unit, "number": 0, "edges": [], "counts": []}
    # The bin of v is its number of bits; frexp is exact for whole numbers below 2^53.
    bins = np.frexp(values.astype(np.float64))[1]
    first, last = int(bins.min()), int(bins.max())
    counts = np.bincount(bins - first, minlength=last - first + 1)
    edges = [0 if n == 0 else 1 << (n - 1) for n in range(first, last + 2)]
    return {
        "unit": unit,
        "number": len(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "smallest": int(values.min()),
        "largest": int(values.max()),
        "edges": edges,
        "counts": counts.tolist(),
    }


def bars(found: dict[str, Any]) -> Iterable[str]:
    """Lines of a histogram: range, bar, count."""
    most = max(found["counts"], default=0)
    width = max((len(f"{edge - 1:,}") for edge in found["edges"]), default=1)
    for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False):
        eighths = -(-8 * _BAR_WIDTH * count // most)
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"{low:>{width},} - {high - 1:>{width},} {bar:<{_BAR_WIDTH}} {count:,}"
