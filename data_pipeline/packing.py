"""Cutting documents into pieces and packing pieces into rows of S positions.

A position holds an input token and its target, the next token of the same document. A document of n tokens so
has n - 1 positions; a piece of p positions reads p + 1 tokens, and consecutive pieces of a document overlap
by one token, so every token but a document's first is a target exactly once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

BEST_FIT, CONCATENATE = "best-fit-decreasing-1", "concatenate-1"
"""Ways of packing, with the version of their rules: part of every fingerprint of an order."""


@dataclass(frozen=True)
class Rows:
    """Packed rows: row r is pieces ``piece_starts[r]:piece_starts[r+1]``.

    ``document`` (position in the given order), ``start`` (token within the document) and ``length``
    (positions) are int64 arrays over pieces, grouped by row.
    """

    piece_starts: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.piece_starts) - 1


def cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of documents of ``lengths`` tokens: (document, start token, positions), documents in order.

    All pieces but a document's last have ``sequence_length`` positions. Documents need at least two tokens.
    """
    positions = lengths.astype(np.int64) - 1
    assert len(positions) == 0 or positions.min() >= 1
    pieces = -(-positions // sequence_length)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = within * sequence_length
    return document, start, np.minimum(positions[document] - start, sequence_length)


def assign_rows(piece_lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: (row of each piece, number of rows).

    Longest pieces first, each into the fullest row that still has room; equal lengths in the given order. The
    number of rows depends on the set of lengths only, not on their order, so it can be planned before
    shuffling.
    """
    order = np.argsort(-piece_lengths, kind="stable")
    row_of = np.empty(len(piece_lengths), dtype=np.int64)
    full = int((piece_lengths == sequence_length).sum())
    row_of[order[:full]] = np.arange(full)
    num_rows = full
    rooms: list[int] = []  # distinct free room of open rows, ascending
    open_rows: dict[int, list[int]] = {}  # room -> rows with that room
    lengths = piece_lengths[order].tolist()
    for rank in range(full, len(lengths)):
        length = lengths[rank]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = sequence_length, num_rows
            num_rows += 1
        row_of[order[rank]] = row
        room -= length
        if room:
            if room in open_rows:
                open_rows[room].append(row)
            else:
                insort(rooms, room)
                open_rows[room] = [row]
    return row_of, num_rows


def concatenate(lengths: np.ndarray, sequence_length: int) -> Rows:
    """Join all positions of the documents in the given order and cut every ``sequence_length``: only the last row may
    have room left, but any document may be cut."""
    positions = lengths.astype(np.int64) - 1
    assert len(positions) == 0 or positions.min() >= 1
    ends = np.cumsum(positions)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.union1d(ends - positions, np.arange(0, total, sequence_length))  # where a piece begins
    document = np.searchsorted(ends, borders, side="right")
    length = np.diff(np.append(borders, total))
    piece_starts = np.searchsorted(borders, np.append(np.arange(0, total, sequence_length), total))
    return Rows(piece_starts, document, borders - (ends - positions)[document], length)


def pack(lengths: np.ndarray, sequence_length: int, packing: str = BEST_FIT) -> Rows:
    """Cut and pack documents of ``lengths`` tokens into rows of at most ``sequence_length`` positions.

    Rows come in the order of their first piece, pieces within a row in document order.
    """
    if packing == CONCATENATE:
        return concatenate(lengths, sequence_length)
    return pack_pieces(*cut(lengths, sequence_length), sequence_length)


def pack_pieces(document: np.ndarray, start: np.ndarray, length: np.ndarray, sequence_length: int) -> Rows:
    """Best-fit rows of the given pieces, in the order of their first piece; pieces in a row in the given order."""
    row_of, num_rows = assign_rows(length, sequence_length)
    first_piece = np.full(num_rows, len(row_of))
    np.minimum.at(first_piece, row_of, np.arange(len(row_of)))
    rank = np.empty(num_rows, dtype=np.int64)
    rank[np.argsort(first_piece, kind="stable")] = np.arange(num_rows)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    piece_starts = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return Rows(piece_starts, document[order], start[order], length[order])


def count_rows(lengths: np.ndarray, sequence_length: int, packing: str = BEST_FIT) -> int:
    """Number of rows that :func:`pack` makes of documents of ``lengths`` tokens, in any order."""
    if packing == CONCATENATE:
        return -(-int((lengths.astype(np.int64) - 1).sum()) // sequence_length)
    return assign_rows(cut(lengths, sequence_length)[2], sequence_length)[1]
