"""Which keys each query sees, as few and small rectangles of the score matrix as documents and windows allow.

Query i sees key j when both are in the same document, j <= i, and, with a window of W tokens, j > i - W: a query sees
itself and the W - 1 tokens before it. Padding sees nothing and is seen by nothing.

Legend: L = sequence length, B = batch, T = tokens of all rows without padding, Q = queries of a tile, K = columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

QUERIES = 128
"""Most queries of a tile, and the length up to which short documents share one."""

Run = tuple[int, int]
"""First position of a document and the first one after it."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores: queries ``start`` to ``stop`` - 1 against keys ``first`` to ``stop`` - 1.

    Attributes:
        row: the row of the batch; None for all rows alike.
        masks: (c, hidden): queries do not see the keys of columns c, c + 1, ... where ``hidden_QK`` is True. Other
            columns are seen by all of the tile's queries.
    """

    row: int | None
    start: int
    stop: int
    first: int
    masks: tuple[tuple[int, Tensor], ...]


class Documents:
    """Where documents lie in the rows of a batch; plans are worked out once and shared by all layers.

    Args:
        length, batch_size: L and B.
        seq_idx_LB: document of each position; a document is a run of equal numbers, and a negative one is padding.
            None when every row is one document.
    """

    def __init__(self, length: int, batch_size: int, device: torch.device, seq_idx_LB: Tensor | None = None) -> None:
        self.length = length
        self.batch_size = batch_size
        self.device = device
        self._seq_idx_LB = seq_idx_LB
        self._tiles: dict[int | None, list[Tile]] = {}
        self._triangles: dict[tuple[int, int, int, bool], Tensor] = {}

    @cached_property
    def runs(self) -> list[list[Run]] | None:
        """The documents of each row in order; None when every row is one document. Waits for the device."""
        if self._seq_idx_LB is None:
            return None
        rows = [_runs(row_L) for row_L in self._seq_idx_LB.cpu().unbind(1)]
        return None if all(row == [(0, self.length)] for row in rows) else rows

    def tiles(self, window: int | None) -> list[Tile]:
        """Tiles that cover every visible pair of query and key once, for tokens that are not padding."""
        if window not in self._tiles:
            self._tiles[window] = list(self._plan(window))
        return self._tiles[window]

    @cached_property
    def token_index_T(self) -> Tensor | None:  # noqa: N802
        """Places of the tokens in [L, B] flattened, row after row, without padding; None when that is all in order."""
        if self.runs is None:
            if self.batch_size == 1:
                return None
            places = torch.arange(self.length * self.batch_size, device=self.device)
            return places.view(self.length, self.batch_size).t().reshape(-1)
        pieces = [
            torch.arange(start, stop) * self.batch_size + row
            for row, runs in enumerate(self.runs)
            for start, stop in runs
        ]
        return torch.cat(pieces or [torch.empty(0, dtype=torch.long)]).to(self.device)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, row after row."""
        if self.runs is None:
            return [self.length] * self.batch_size
        return [stop - start for runs in self.runs for start, stop in runs]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where documents begin among the T tokens, with T appended: int32 [documents + 1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    def _plan(self, window: int | None) -> Iterator[Tile]:
        if self.runs is None:
            yield from self._row_tiles(None, [(0, self.length)], window)
            return
        for row, runs in enumerate(self.runs):
            yield from self._row_tiles(row, runs, window)

    def _row_tiles(self, row: int | None, runs: list[Run], window: int | None) -> Iterator[Tile]:
        """Long documents are cut, neighbouring short ones share a tile."""
        group: list[Run] = []
        for start, stop in runs:
            if group and stop - group[0][0] > QUERIES:
                yield self._shared_tile(row, group, window)
                group = []
            if stop - start > QUERIES:
                yield from self._cut(row, start, stop, window)
            else:
                group.append((start, stop))
        if group:
            yield self._shared_tile(row, group, window)

    def _cut(self, row: int | None, begin: int, end: int, window: int | None) -> Iterator[Tile]:
        tiles = -(-(end - begin) // QUERIES)
        size = -(-(end - begin) // tiles)
        for start in range(begin, end, size):
            stop = min(start + size, end)
            first = begin if window is None else max(begin, start - window + 1)
            queries = stop - start
            # Among the last columns, the queries' own: none sees a later key.
            masks = [(start - first, self._triangle(queries, queries, 1, True))]
            # Among the first columns: query i sees none before i - W + 1.
            offset = 0 if window is None else start - first - window + 1
            reach = queries - 1 + offset
            if window is not None and reach > 0:
                masks.append((0, self._triangle(queries, min(reach, stop - first), offset - 1, False)))
            yield Tile(row, start, stop, first, tuple(masks))

    def _shared_tile(self, row: int | None, runs: list[Run], window: int | None) -> Tile:
        """One tile for whole documents."""
        start, stop = runs[0][0], runs[-1][1]
        if len(runs) == 1 and (window is None or window >= stop - start):
            return Tile(row, start, stop, start, ((0, self._triangle(stop - start, stop - start, 1, True)),))
        position = torch.arange(stop - start)
        lowest = torch.cat([torch.full((b - a,), a - start) for a, b in runs])
        if window is not None:
            lowest = torch.maximum(lowest, position - (window - 1))
        hidden_QK = (position > position.unsqueeze(1)) | (position < lowest.unsqueeze(1))
        return Tile(row, start, stop, start, ((0, hidden_QK.to(self.device)),))

    def _triangle(self, queries: int, columns: int, diagonal: int, upper: bool) -> Tensor:
        """True above (or below) and on the diagonal of that number; the same tensor each time."""
        key = queries, columns, diagonal, upper
        if key not in self._triangles:
            full = torch.ones(queries, columns, dtype=torch.bool, device=self.device)
            self._triangles[key] = full.triu_(diagonal) if upper else full.tril_(diagonal)
        return self._triangles[key]


def _runs(ids_L: Tensor) -> list[Run]:
    changes = (ids_L[1:] != ids_L[:-1]).nonzero().squeeze(1) + 1
    edges = [0, *changes.tolist(), len(ids_L)]
    first_ids = ids_L[edges[:-1]].tolist()
    return [(edges[i], edges[i + 1]) for i, number in enumerate(first_ids) if number >= 0]
