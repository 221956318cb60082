"""Cutting a sequence into chunks of one length, worked on a slab of several chunks at a time.

Legend: L = sequence length, B = batch, Q = chunk length, K = chunks, R = rows of one slab (its chunks times the batch).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A run of chunks of one length (all the full ones, or the shorter last one), worked on slab by slab."""

    start: int
    first: int  # number of the first chunk
    chunks: int
    length: int
    chunks_at_once: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.length

    def chunks_of(self, slab: int) -> slice:
        """Chunks of a slab, counted from the beginning of the span."""
        first = slab * self.chunks_at_once
        return slice(first, min(first + self.chunks_at_once, self.chunks))

    def slabs(self) -> list[slice]:
        """The chunks of each slab, in order."""
        return [self.chunks_of(slab) for slab in range(-(-self.chunks // self.chunks_at_once))]

    def split(self, tensor_LBX: Tensor) -> Tensor:
        """[L, B, ...] -> a view [Q, K, B, ...] of the span's part."""
        part = tensor_LBX[self.start : self.stop].unflatten(0, (self.chunks, self.length))
        return part.transpose(0, 1)

    def view(self, tensor_LBX: Tensor, slab: int) -> Tensor:
        """[L, B, ...] -> a view [Q, K of the slab, B, ...]."""
        return self.split(tensor_LBX)[:, self.chunks_of(slab)]

    def views(self, tensor_LBX: Tensor) -> tuple[Tensor, ...]:
        """[L, B, ...] -> a view [Q, K of the slab, B, ...] per slab."""
        return self.split(tensor_LBX).split(self.chunks_at_once, dim=1)

    def cut(self, tensor_LBX: Tensor, work: torch.dtype) -> list[Tensor]:
        """[L, B, ...] -> one [Q, R, ...] per slab; a view when the slab is one chunk of precision `work`."""
        return [slab.flatten(1, 2).to(work) for slab in self.views(tensor_LBX)]


def spans_of(length: int, chunk_size: int, chunks_at_once: int | None) -> list[Span]:
    """The full chunks, and the rest. `chunks_at_once`: chunks per slab; None = all."""
    full, rest = divmod(length, chunk_size)
    spans = [Span(0, 0, full, chunk_size, chunks_at_once or full)] if full else []
    return [*spans, Span(full * chunk_size, full, 1, rest, 1)] if rest else spans


def document_starts(seq_idx_LB: Tensor) -> Tensor:
    """Mark the positions whose document differs from the position before: bool [L, B], row 0 always False.

    Args:
        seq_idx_LB: document number per position, padding -1; only changes matter, not the numbers.
    """
    starts_LB = torch.zeros_like(seq_idx_LB, dtype=torch.bool)
    starts_LB[1:] = seq_idx_LB[1:] != seq_idx_LB[:-1]
    return starts_LB


def document_numbers(seq_idx_LB: Tensor) -> Tensor:
    """Running document number, starting at 0: unlike the given numbers it never returns to an earlier value."""
    return document_starts(seq_idx_LB).cumsum(0)
