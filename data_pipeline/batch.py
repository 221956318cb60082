"""Packed rows, lean and unpacked.

B = rows, S = positions in a row, P = most pieces in a row of the batch.

A *lean* batch holds what cannot be derived: ``tokens`` [B, S] in the stored dtype, ``pieces`` int32 [B, P], the
positions of each piece (0: no piece), and ``last`` [B, P], the target of each piece's last position, which is no token
of the row. Everything else follows. Where a token is no target of the one before it (images between text), a lean batch
has ``targets`` [B, S] instead of ``last``.
"""

from __future__ import annotations

import numpy as np

Arrays = dict[str, np.ndarray]


def unpack(lean: Arrays) -> Arrays:
    """The full batch; entries of ``lean`` other than these are passed on.

    ``tokens``, ``targets`` int32 [B, S]; ``loss_mask`` bool [B, S], False on padding; ``segment_ids`` int32 [B, S], 0,
    1, 2, ... per piece in the row and -1 on padding (what Mamba kernels call ``seq_idx``); ``position_ids`` int32
    [B, S], restarting with each piece, 0 on padding; ``cu_seqlens`` int32, where pieces begin in the batch laid out as
    one sequence of B * S positions, with the end appended (the padding at a row's end is a piece of its own, so that
    the last entry is B * S); ``max_seqlen`` int32 scalar, the longest of these pieces.
    """
    pieces = lean["pieces"]
    num_rows, length = lean["tokens"].shape
    used = pieces.sum(axis=1)
    assert bool((used <= length).all())
    runs = np.concatenate((pieces, (length - used)[:, None]), axis=1).ravel()
    ends = np.cumsum(runs, dtype=np.int32)
    numbers = np.tile(np.append(np.arange(pieces.shape[1], dtype=np.int32), np.int32(-1)), num_rows)
    segment_ids = np.repeat(numbers, runs).reshape(num_rows, length)
    position_ids = np.arange(num_rows * length, dtype=np.int32) - np.repeat(ends - runs.astype(np.int32), runs)
    loss_mask = segment_ids >= 0
    position_ids = position_ids.reshape(num_rows, length) * loss_mask
    present = runs > 0
    return {
        **{name: array for name, array in lean.items() if name not in ("pieces", "last")},
        "tokens": lean["tokens"].astype(np.int32),
        "targets": _targets(lean).astype(np.int32),
        "loss_mask": loss_mask,
        "segment_ids": segment_ids,
        "position_ids": position_ids,
        "cu_seqlens": np.concatenate((np.zeros(1, dtype=np.int32), ends[present])),
        "max_seqlen": np.array(runs.max(initial=0), dtype=np.int32),
    }


def _targets(lean: Arrays) -> np.ndarray:
    if "targets" in lean:
        return lean["targets"]
    tokens, pieces = lean["tokens"], lean["pieces"]
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    present = pieces > 0
    rows, _ = np.nonzero(present)
    targets[rows, np.cumsum(pieces, axis=1)[present] - 1] = lean["last"][present]
    return targets


def concatenate_lean(batches: list[Arrays], places: list[list[int]]) -> Arrays:
    """One lean batch of several, row i of batch b at ``places[b][i]``."""
    num_rows = sum(map(len, places))
    result: Arrays = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        width = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else None
        shape = (num_rows, *(() if width is None else (width,)))
        result[name] = np.zeros(shape, dtype=np.result_type(*(part.dtype for part in parts)))
        for part, rows in zip(parts, places, strict=True):
            result[name][(rows, slice(part.shape[1])) if width is not None else rows] = part
    return result
