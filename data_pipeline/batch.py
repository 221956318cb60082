"""Packed rows, lean and unpacked.

B = rows, S = positions in a row, P = pieces in all rows of the batch.

A *lean* batch holds what cannot be derived: ``tokens`` [B, S] in the stored dtype, ``row_pieces`` int32 [B], the number
of pieces in each row, and ``pieces`` int32 [2, P], row after row: the positions of each piece, and the target of its
last position, which is no token of the row. Everything else follows. Where a token is not the target of the one before
it (images between text), a lean batch has ``targets`` [B, S] besides.
"""

from __future__ import annotations

import numpy as np

Arrays = dict[str, np.ndarray]


def unpack(lean: Arrays) -> Arrays:
    """The full batch; entries of ``lean`` other than these are passed on.

    ``tokens``, ``targets`` int32 [B, S]; ``loss_mask`` bool [B, S], False on padding; ``seq_idx`` int32 [B, S], 0,
    1, 2, ... per piece in the row and -1 on padding; ``position_ids`` int32
    [B, S], restarting with each piece, 0 on padding; ``cu_seqlens`` int32, where pieces begin in the batch laid out as
    one sequence of B * S positions, with the end appended (the padding at a row's end is a piece of its own, so that
    the last entry is B * S); ``max_seqlen`` int32 scalar, the longest of these pieces.
    """
    pieces, counts = lean["pieces"][0], lean["row_pieces"]
    num_rows, length = lean["tokens"].shape
    ends = np.cumsum(counts)
    used = np.diff(np.concatenate(([0], np.cumsum(pieces, dtype=np.int64)))[np.concatenate(([0], ends))])
    assert bool((used <= length).all())
    # After its pieces each row has one more run, the padding, which may be empty.
    runs = np.insert(pieces, ends, length - used).astype(np.int32)
    numbers = np.arange(len(pieces), dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
    seq_idx = np.repeat(np.insert(numbers, ends, -1), runs).reshape(num_rows, length)
    run_ends = np.cumsum(runs, dtype=np.int32)
    position_ids = np.arange(num_rows * length, dtype=np.int32) - np.repeat(run_ends - runs, runs)
    loss_mask = seq_idx >= 0
    return {
        **{name: array for name, array in lean.items() if name not in ("row_pieces", "pieces")},
        "tokens": lean["tokens"].astype(np.int32),
        "targets": _targets(lean, used).astype(np.int32),
        "loss_mask": loss_mask,
        "seq_idx": seq_idx,
        "position_ids": position_ids.reshape(num_rows, length) * loss_mask,
        "cu_seqlens": np.concatenate((np.zeros(1, dtype=np.int32), run_ends[runs > 0])),
        "max_seqlen": np.array(runs.max(initial=0), dtype=np.int32),
    }


def _targets(lean: Arrays, used: np.ndarray) -> np.ndarray:
    if "targets" in lean:
        return lean["targets"]
    tokens, (pieces, last) = lean["tokens"], lean["pieces"]
    num_rows, length = tokens.shape
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    # Where pieces end, in the batch as one sequence: padding of earlier rows lies before them.
    padding = np.concatenate(([0], np.cumsum(length - used)[:-1])) if num_rows else np.zeros(0, dtype=np.int64)
    ends = np.cumsum(pieces, dtype=np.int64) + np.repeat(padding, lean["row_pieces"]) - 1
    targets.reshape(-1)[ends] = last
    return targets


def pad_rows(lean: Arrays, num_rows: int) -> Arrays:
    """``lean`` with empty rows (no pieces) after it, so that it has ``num_rows``."""
    padded = dict(lean)
    for name, array in lean.items():
        if name != "pieces" and len(array) < num_rows:
            missing = np.zeros((num_rows - len(array), *array.shape[1:]), dtype=array.dtype)
            padded[name] = np.concatenate((array, missing))
    return padded


def concatenate_lean(batches: list[Arrays], places: list[list[int]]) -> Arrays:
    """One lean batch of several, row i of batch b at ``places[b][i]``."""
    place = np.concatenate([np.array(rows, dtype=np.int64) for rows in places])
    order = np.argsort(place, kind="stable")
    result = {
        name: np.concatenate([batch[name] for batch in batches], axis=1 if name == "pieces" else 0)
        for name in batches[0]
    }
    rows = {name: array[order] for name, array in result.items() if name not in ("row_pieces", "pieces")}
    return rows | reorder_pieces(result, place)


def reorder_pieces(lean: Arrays, place: np.ndarray) -> Arrays:
    """``row_pieces`` and ``pieces`` of ``lean`` with row i moved to ``place[i]``."""
    order = np.empty_like(place)
    order[place] = np.arange(len(place))
    counts = lean["row_pieces"]
    starts = (np.cumsum(counts) - counts)[order]
    counts = counts[order]
    # The pieces of each row in its new place: count up from where the row's pieces were.
    by_piece = np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return {"row_pieces": counts, "pieces": lean["pieces"][:, by_piece]}


def split_lean(lean: Arrays, sizes: list[int]) -> list[Arrays]:
    """Batches of ``sizes`` rows, one after the other, as views of ``lean``."""
    rows = [0, *np.cumsum(sizes).tolist()]
    pieces = np.concatenate(([0], np.cumsum(lean["row_pieces"])))[rows].tolist()
    return [
        {
            name: array[:, pieces[number] : pieces[number + 1]]
            if name == "pieces"
            else array[rows[number] : rows[number + 1]]
            for name, array in lean.items()
        }
        for number in range(len(sizes))
    ]
