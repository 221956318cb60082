"""Shard: which elements of a logical tensor a stored piece covers. Torch-free.

Splitting a row-major tensor of shape ``(n_0, .., n_k)`` along dimension d gives, on every rank, a *column range* of the
matrix ``(n_0 .. n_(d-1), n_d .. n_k)``. So one description serves every split: ``num_rows`` rows of ``row_length``
elements, of which columns ``[start, stop)`` are held, row after row. A split along dimension 0 has a single row, and
its shard is a contiguous flat range; the whole tensor is the single row with all its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Shard:
    """Columns ``[start, stop)`` of a tensor seen as ``num_rows`` x ``row_length`` elements."""

    num_rows: int
    row_length: int
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Shard:
        """The shard that is the whole tensor of ``shape``."""
        numel = prod(shape)
        return cls(1, numel, 0, numel)

    @classmethod
    def split(cls, shape: tuple[int, ...], dim: int, rank: int, size: int) -> Shard:
        """Part ``rank`` of ``size`` equal parts of a tensor of (whole) ``shape`` along ``dim``."""
        assert shape[dim] % size == 0, f"dimension {dim} of {shape} does not split in {size} parts"
        row_length = prod(shape[dim:])
        width = row_length // size
        return cls(prod(shape[:dim]), row_length, rank * width, (rank + 1) * width)

    @property
    def width(self) -> int:
        """Elements held of each row."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Elements held."""
        return self.num_rows * self.width

    @property
    def is_contiguous(self) -> bool:
        """Whether the held elements are one flat range of the tensor, beginning at ``start``."""
        return self.num_rows == 1 or self.width == self.row_length

    def flat_index(self, local: int) -> int:
        """Position in the row-major whole tensor of element ``local`` of the shard."""
        return local // self.width * self.row_length + self.start + local % self.width
