"""Causal grouped-query attention over packed documents (Ainslie et al., arXiv 2305.13245), with its options.

Shapes: L = sequence length, S = cached keys, B = batch, D = model width, H = query heads, J = key/value
heads, P = head dim. Heads are split over tensor-parallel ranks: inside a layer H and J count what this rank holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.nn.attention_config import AttentionConfig
from pretrain.nn.initialisation import Initialiser, constant, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mixer_config import Place
from pretrain.nn.norm import HeadRMSNorm
from pretrain.nn.rope import apply_rotary
from pretrain.ops.attention import attend_to_all, causal_attention
from pretrain.parallel.layers import ParallelLayers

INITIAL_GATE = 0.25
"""What a gate of each head lets through at the start (arXiv 2306.12929, section 4.2)."""


class AttentionCache:
    """Keys and values that later positions see: all so far, or those of the last ``window`` positions.

    Buffers double when full, up to the window, so appending costs amortised constant time. In a full window the newest
    position takes the place of the oldest: attention does not depend on the order of keys.
    """

    def __init__(
        self,
        batch_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> None:
        self.length = 0
        self._window = window
        self._next = 0  # where the next position goes
        self._keys_SBJP = torch.empty(0, batch_size, heads, head_dim, dtype=dtype, device=device)
        self._values_SBJP = torch.empty_like(self._keys_SBJP)

    @property
    def kept(self) -> int:
        """Positions held."""
        return self.length if self._window is None else min(self.length, self._window)

    def append(self, k_LBJP: Tensor, v_LBJP: Tensor) -> tuple[Tensor, Tensor]:
        """Add a whole prompt to an empty cache, or one position; returns all keys and values held, [S, B, J, P]."""
        new = len(k_LBJP)
        assert new == 1 or self.length == 0, "a cache takes a whole prompt first, then single positions"
        self.length += new
        if self._window is not None:
            k_LBJP, v_LBJP = k_LBJP[-self._window :], v_LBJP[-self._window :]
        self._keys_SBJP = self._stored(self._keys_SBJP, k_LBJP)
        self._values_SBJP = self._stored(self._values_SBJP, v_LBJP)
        self._next += len(k_LBJP)
        if self._window is not None:
            self._next %= self._window
        return self._keys_SBJP[: self.kept], self._values_SBJP[: self.kept]

    def _stored(self, buffer_SBJP: Tensor, x_LBJP: Tensor) -> Tensor:
        start, stop = self._next, self._next + len(x_LBJP)
        if stop > len(buffer_SBJP):
            capacity = max(64, 2 * stop)
            if self._window is not None:
                capacity = min(capacity, self._window)
            larger = buffer_SBJP.new_empty(capacity, *buffer_SBJP.shape[1:])
            larger[:start] = buffer_SBJP[:start]
            buffer_SBJP = larger
        buffer_SBJP[start:stop] = x_LBJP
        return buffer_SBJP


class Attention(nn.Module):
    """Grouped-query self-attention: x_LBD -> y_LBD, causal, within documents.

    Args:
        place: width of the residual stream, and which attention layer this is (for its window).
        config: sizes of the whole model; J divides H, and H/J query heads share a key/value head.
    """

    def __init__(self, layers: ParallelLayers, place: Place, config: AttentionConfig) -> None:
        super().__init__()
        width = place.width
        num_heads, num_kv_heads, head_dim = config.num_heads, config.kv_heads, config.features(width)
        self.num_heads = layers.local(num_heads)
        self.num_kv_heads = layers.local(num_kv_heads)
        self.head_dim = head_dim
        self.rope_theta = config.rope_theta
        self.rope_scaling = config.rope_scaling
        self.rotary_dim = config.rotary_features(width)
        self.window = config.window(place.occurrence)
        self.softcap = config.softcap
        self.clip = None if config.clip_gamma is None else (config.clip_gamma, config.clip_zeta)
        self.gate_kind = config.gate
        components = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        self.qkv = layers.fused_column(width, components, bias=config.qkv_bias)
        self.q_norm = HeadRMSNorm(layers, head_dim, place.norm_eps) if config.qk_norm else None
        self.k_norm = HeadRMSNorm(layers, head_dim, place.norm_eps) if config.qk_norm else None
        if config.gate == "head":
            self.gate = layers.column(width, num_heads, bias=True)
        elif config.gate == "feature":
            self.gate = layers.column(width, num_heads * head_dim, bias=config.qkv_bias)
        self.out_proj = layers.row(num_heads * head_dim, width, bias=config.out_bias)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal weights, zero biases; ``out_std`` for the projection that writes to the residual stream."""
        fills = {"qkv.weight": normal(std), "qkv.bias": constant(0.0)}
        fills |= {"out_proj.weight": normal(out_std), "out_proj.bias": constant(0.0)}
        fills |= {"q_norm.weight": constant(1.0), "k_norm.weight": constant(1.0)}
        start = math.log(INITIAL_GATE / (1 - INITIAL_GATE)) if self.gate_kind == "head" else 0.0
        fills |= {"gate.weight": normal(std), "gate.bias": constant(start)}
        return {name: fills[name] for name, _ in self.named_parameters()}

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> AttentionCache:
        """Empty key/value cache."""
        return AttentionCache(batch_size, self.num_kv_heads, self.head_dim, dtype, device, self.window)

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: AttentionCache | None = None) -> Tensor:
        """Attend.

        With a cache, the new positions are appended to it: either a whole prompt to an empty cache, or one
        position at a time.
        """
        q_LBHP, k_LBJP, v_LBJP = self._heads(x_LBD, layout)
        if cache is not None and cache.length:
            y_LBHP = attend_to_all(q_LBHP, *cache.append(k_LBJP, v_LBJP), self.softcap, self.clip)
        else:
            if cache is not None:
                cache.append(k_LBJP, v_LBJP)
            y_LBHP = causal_attention(q_LBHP, k_LBJP, v_LBJP, layout.documents, self.window, self.softcap, self.clip)
        if self.gate_kind != "none":
            gates = self.gate(x_LBD).unflatten(-1, (self.num_heads, -1))  # one or P for each head
            y_LBHP = y_LBHP * gates.sigmoid()
        return self.out_proj(y_LBHP.reshape(*y_LBHP.shape[:2], self.num_heads * self.head_dim))

    def _heads(self, x_LBD: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed and rotated."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv_LBHP = self.qkv(x_LBD).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        if self.rope_theta is None and self.q_norm is None:
            q_LBHP, k_LBJP, v_LBJP = qkv_LBHP.split([heads, kv_heads, kv_heads], dim=2)
            return q_LBHP, k_LBJP, v_LBJP
        qk_LBHP, v_LBJP = qkv_LBHP.split([heads + kv_heads, kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_LBHP, k_LBJP = qk_LBHP.split([heads, kv_heads], dim=2)
            q_LBHP, k_LBJP = self.q_norm(q_LBHP), self.k_norm(k_LBJP)
            if self.rope_theta is not None:
                tables = self._tables(layout)
                q_LBHP, k_LBJP = apply_rotary(q_LBHP, *tables), apply_rotary(k_LBJP, *tables)
        else:
            q_LBHP, k_LBJP = apply_rotary(qk_LBHP, *self._tables(layout)).split([heads, kv_heads], dim=2)
        return q_LBHP, k_LBJP, v_LBJP

    def _tables(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        assert self.rope_theta is not None
        return layout.rotary_tables(self.rotary_dim, self.rope_theta, self.rope_scaling)
