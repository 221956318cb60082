"""What every layer of one forward pass needs to know about its sequences, worked out once.

Shapes: L = sequence length, B = batch, P = head dim.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pretrain.nn.rope import rotary_tables


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
        self._rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @cached_property
    def position_ids_LB(self) -> Tensor:  # noqa: N802
        """Positions within documents; without given ids, one row broadcast over the batch ([L, 1])."""
        if self._position_ids_LB is not None:
            return self._position_ids_LB
        start = self._first_position
        return torch.arange(start, start + self.length, device=self.device).unsqueeze(1)

    @cached_property
    def attention_mask_B1LL(self) -> Tensor | None:  # noqa: N802
        """True where query (third dim) may see key (last): same document, not later. None: plain causal."""
        if self.seq_idx_LB is None:
            return None
        ids_BL = self.seq_idx_LB.t()
        same_BLL = ids_BL.unsqueeze(2) == ids_BL.unsqueeze(1)
        causal_LL = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()
        return (same_BLL & causal_LL).unsqueeze(1)

    def rotary_tables(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines for these positions (see :func:`pretrain.nn.rope.rotary_tables`), shared by all
        layers.
        """
        key = (head_dim, theta)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.position_ids_LB, head_dim, theta)
        return self._rotary[key]
