"""What every layer of one forward pass needs to know about its sequences, worked out once.

Shapes: L = sequence length, B = batch.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pretrain.nn.attention_config import RopeScaling
from pretrain.nn.rope import rotary_tables
from pretrain.ops.attention_tiles import Documents


class SequenceLayout:
    """Documents and positions of a batch of packed sequences.

    Args:
        length, batch_size: L and B of the tokens (hidden states between layers may hold a share of L).
        device: where the hidden states live.
        seq_idx_LB: document of each token within its row; None when every row is one document. Padding
            has its own id (-1), so it forms a segment of its own and reaches no real token.
        position_ids_LB: position of each token within its document; None counts from ``first_position``.
        first_position: position of the first token when ``position_ids_LB`` is None (length of a cached
            prefix).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        device: torch.device,
        seq_idx_LB: Tensor | None = None,
        position_ids_LB: Tensor | None = None,
        first_position: int = 0,
    ) -> None:
        for name, ids in (("seq_idx", seq_idx_LB), ("position_ids", position_ids_LB)):
            if ids is not None and tuple(ids.shape) != (length, batch_size):
                raise ValueError(
                    f"{name}: found shape {tuple(ids.shape)}, expected {(length, batch_size)} (sequence, batch) "
                    "like the tokens; transpose batch-first arrays"
                )
        self.length = length
        self.batch_size = batch_size
        self.device = device
        self.seq_idx_LB = None if seq_idx_LB is None else seq_idx_LB.contiguous()
        self._position_ids_LB = position_ids_LB
        self._first_position = first_position
        self._rotary: dict[tuple[int, float, RopeScaling | None], tuple[Tensor, Tensor]] = {}

    @cached_property
    def position_ids_LB(self) -> Tensor:  # noqa: N802
        """Positions within documents; without given ids, one row broadcast over the batch ([L, 1])."""
        if self._position_ids_LB is not None:
            return self._position_ids_LB
        start = self._first_position
        return torch.arange(start, start + self.length, device=self.device).unsqueeze(1)

    @cached_property
    def documents(self) -> Documents:
        """Where documents lie, for attention."""
        return Documents(self.length, self.batch_size, self.device, self.seq_idx_LB)

    def rotary_tables(self, rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for these positions (see :func:`pretrain.nn.rope.rotary_tables`), shared by all
        layers.
        """
        key = (rotary_dim, theta, scaling)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.position_ids_LB, rotary_dim, theta, scaling)
        return self._rotary[key]
