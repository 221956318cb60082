"""Cutting a sequence into row blocks, so that a chain of element-wise passes stays in the CPU cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# 1 MiB in float32: a handful of such buffers fits a server core's share of the last-level cache. Measured flat from
# half to twice this size; smaller blocks cost more in calls than they save in memory traffic.
BLOCK_NUMBERS = 1 << 18


def row_blocks(first: int, last: int, numbers_per_row: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) covering rows first..last; on accelerators one block, to launch few kernels."""
    rows = last - first
    if device.type == "cpu":
        rows = min(rows, max(1, BLOCK_NUMBERS // numbers_per_row))
    for start in range(first, last, max(rows, 1)):
        yield start, min(start + rows, last)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision a kernel computes in: float64 for float64 inputs (gradient checks), float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
