"""Packed rows for tests of kernels over sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def documents(L: int, B: int, seed: int = 0) -> Tensor:
    """Random documents in order, padding (-1) at the end of the last row; [L, B]."""
    g = torch.Generator().manual_seed(seed)
    seq_idx = torch.randint(0, 4, (L, B), generator=g).sort(0)[0]
    seq_idx[L - L // 5 :, -1] = -1
    return seq_idx
