"""Causal grouped-query attention over packed documents (Ainslie et al., arXiv 2305.13245).

Shapes: L = sequence length, S = cached keys, B = batch, D = model width, H = query heads, J = key/value
heads, P = head dim. Heads are split over tensor-parallel ranks: inside a layer H and J count what this rank holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pretrain.nn.attention_config import AttentionConfig
from pretrain.nn.initialisation import Initialiser, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.rope import apply_rotary
from pretrain.parallel.layers import ParallelLayers


class AttentionCache:
    """Keys and values seen so far. The buffers double when full: appending costs amortised constant time."""

    def __init__(self, batch_size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self._keys_BJSP = torch.empty(batch_size, heads, 0, head_dim, dtype=dtype, device=device)
        self._values_BJSP = torch.empty_like(self._keys_BJSP)

    def append(self, k_BJLP: Tensor, v_BJLP: Tensor) -> tuple[Tensor, Tensor]:
        """Add L positions; returns all keys and values so far, [B, J, S, P] each."""
        start, self.length = self.length, self.length + k_BJLP.shape[2]
        if self.length > self._keys_BJSP.shape[2]:
            self._keys_BJSP = self._grown(self._keys_BJSP, start)
            self._values_BJSP = self._grown(self._values_BJSP, start)
        self._keys_BJSP[:, :, start : self.length] = k_BJLP
        self._values_BJSP[:, :, start : self.length] = v_BJLP
        return self._keys_BJSP[:, :, : self.length], self._values_BJSP[:, :, : self.length]

    def _grown(self, buffer_BJSP: Tensor, used: int) -> Tensor:
        batch_size, heads, _, head_dim = buffer_BJSP.shape
        larger = buffer_BJSP.new_empty(batch_size, heads, max(64, 2 * self.length), head_dim)
        larger[:, :, :used] = buffer_BJSP[:, :, :used]
        return larger


class Attention(nn.Module):
    """Grouped-query self-attention: x_LBD -> y_LBD, causal, within documents.

    Args:
        width: D.
        config: sizes of the whole model; J divides H, and H/J query heads share a key/value head.
    """

    def __init__(self, layers: ParallelLayers, width: int, config: AttentionConfig) -> None:
        super().__init__()
        num_heads, num_kv_heads, head_dim = config.num_heads, config.kv_heads, config.features(width)
        self.num_heads = layers.local(num_heads)
        self.num_kv_heads = layers.local(num_kv_heads)
        self.head_dim = head_dim
        self.rope_theta = config.rope_theta
        components = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        self.qkv = layers.fused_column(width, components)
        self.out_proj = layers.row(num_heads * head_dim, width)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal weights; ``out_std`` for the projection that writes to the residual stream."""
        return {"qkv.weight": normal(std), "out_proj.weight": normal(out_std)}

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> AttentionCache:
        """Empty key/value cache."""
        return AttentionCache(batch_size, self.num_kv_heads, self.head_dim, dtype, device)

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: AttentionCache | None = None) -> Tensor:
        """Attend.

        With a cache, the new positions are appended to it: either a whole prompt to an empty cache, or one
        position at a time.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv_LBHP = self.qkv(x_LBD).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        length, batch_size = qkv_LBHP.shape[:2]
        if self.rope_theta is not None:
            qk_LBHP, v_LBJP = qkv_LBHP.split([heads + kv_heads, kv_heads], dim=2)
            qk_LBHP = apply_rotary(qk_LBHP, *layout.rotary_tables(self.head_dim, self.rope_theta))
            q_LBHP, k_LBJP = qk_LBHP.split([heads, kv_heads], dim=2)
        else:
            q_LBHP, k_LBJP, v_LBJP = qkv_LBHP.split([heads, kv_heads, kv_heads], dim=2)
        q_BHLP, k_BJSP, v_BJSP = (t.permute(1, 2, 0, 3) for t in (q_LBHP, k_LBJP, v_LBJP))
        if cache is not None:
            assert length == 1 or cache.length == 0, "a cache takes a whole prompt first, then single positions"
            k_BJSP, v_BJSP = cache.append(k_BJSP, v_BJSP)
        mask = layout.attention_mask_B1LL
        y_BHLP = F.scaled_dot_product_attention(
            q_BHLP,
            k_BJSP,
            v_BJSP,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=heads != kv_heads,
        )
        return self.out_proj(y_BHLP.permute(2, 0, 1, 3).reshape(length, batch_size, heads * self.head_dim))
