"""Attention over the tiles of :class:`pretrain.ops.attention_tiles.Documents`, with a hand-written backward that
computes scores again instead of keeping them: memory grows with the length, not with its square, and work with the
number of visible pairs. Runs on any device, in float32 (float64 for float64 inputs).

Legend: L = sequence length, B = batch, H = query heads, J = key/value heads, G = H/J query heads that share one, P =
head dim, N = B*J, n = those of N worked on at once, Q = queries of a tile, K = its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.attention_tiles import Documents, Tile
from pretrain.ops.blocks import BLOCK_NUMBERS, arithmetic_dtype

Clip = tuple[float, float]
"""gamma and zeta of clipped softmax."""


def blocked_attention(
    q_LBHP: Tensor,
    k_LBJP: Tensor,
    v_LBJP: Tensor,
    documents: Documents,
    window: int | None = None,
    softcap: float | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """y_LBHP; arguments as in :func:`pretrain.ops.attention.causal_attention`. Zero at padding."""
    return _Blocked.apply(q_LBHP, k_LBJP, v_LBJP, documents.tiles(window), softcap, clip)


def weights_of(scores: Tensor, softcap: float | None, clip: Clip | None) -> Tensor:
    """Attention weights over the last dimension of (masked) scores, by torch's own operations."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.softmax(-1)
    if clip is not None:
        gamma, zeta = clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0.0, 1.0)
    return weights


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], softcap: float | None, clip: Clip | None
    ) -> Tensor:
        work = arithmetic_dtype(q.dtype)
        q_NLGP, k_NLP, v_NLP = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
        y_LNGP = q.new_zeros(q.shape[0], *q_NLGP.shape[:1], *q_NLGP.shape[2:])
        scores = _Scores(q_NLGP.to(work), k_NLP.to(work), softcap, tiles, k.shape[2])
        values = v_NLP.to(work)
        for tile, heads in scores.parts():
            _, weights_nRK = scores.compute(tile, heads)
            if clip is not None:
                _clip_(weights_nRK, clip)
            y_nRP = torch.bmm(weights_nRK, values[heads, tile.first : tile.stop])
            y_LNGP[tile.start : tile.stop, heads] = _by_query(y_nRP, q_NLGP.shape[2])
        ctx.save_for_backward(q_NLGP, k_NLP, v_NLP)
        ctx.plan = tiles, softcap, clip, k.shape[2]
        return y_LNGP.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_LBHP: Tensor) -> tuple[Tensor | None, ...]:
        q_NLGP, k_NLP, v_NLP = ctx.saved_tensors
        tiles, softcap, clip, kv_heads = ctx.plan
        work = arithmetic_dtype(q_NLGP.dtype)
        queries, keys, values = q_NLGP.to(work), k_NLP.to(work), v_NLP.to(work)
        dy_NLGP = _by_head(dy_LBHP, kv_heads).to(work)
        dq_NLGP, dk_NLP, dv_NLP = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        scores = _Scores(queries, keys, softcap, tiles, kv_heads)
        gradients = scores.empty_like()
        for tile, heads in scores.parts():
            tanh_nRK, weights_nRK = scores.compute(tile, heads)
            seen = heads, slice(tile.first, tile.stop)
            rows_nRP = dy_NLGP[heads, tile.start : tile.stop].flatten(1, 2)
            dscores_nRK = _shaped(gradients, weights_nRK.shape)
            torch.bmm(rows_nRP, values[seen].transpose(1, 2), out=dscores_nRK)
            used_nRK = weights_nRK
            if clip is not None:
                used_nRK = _clip_(weights_nRK.clone(), clip)
                # Where the unclipped value lies outside [0, 1], the gradient ends.
                gamma, zeta = clip
                low, high = -gamma / (zeta - gamma), (1.0 - gamma) / (zeta - gamma)
                inside = (weights_nRK >= low) & (weights_nRK <= high)
                dscores_nRK.mul_(inside).mul_(zeta - gamma)
            dv_NLP[seen].baddbmm_(used_nRK.transpose(1, 2), rows_nRP)
            torch.ops.aten._softmax_backward_data.out(dscores_nRK, weights_nRK, -1, work, grad_input=dscores_nRK)
            if tanh_nRK is not None:
                dscores_nRK.addcmul_(dscores_nRK, tanh_nRK.square_(), value=-1.0)
            scale, q_nRP = scores.scale, queries[heads, tile.start : tile.stop].flatten(1, 2)
            dq_nRP = torch.baddbmm(q_nRP, dscores_nRK, keys[seen], beta=0, alpha=scale)
            dq_NLGP[heads, tile.start : tile.stop] = dq_nRP.unflatten(1, (-1, queries.shape[2]))
            dk_NLP[seen].baddbmm_(dscores_nRK.transpose(1, 2), q_nRP, alpha=scale)
        dtype = q_NLGP.dtype
        batch_size = len(queries) // kv_heads
        dq = _by_position(dq_NLGP.to(dtype), batch_size).flatten(2, 3)
        dk, dv = (_by_position(gradient.to(dtype), batch_size) for gradient in (dk_NLP, dv_NLP))
        return dq, dk, dv, None, None, None


class _Scores:
    """Scores of tiles, in buffers that are used again for each: fresh memory costs the CPU as much as the work."""

    def __init__(self, q_NLGP: Tensor, k_NLP: Tensor, softcap: float | None, tiles: list[Tile], kv_heads: int) -> None:
        self.scale = q_NLGP.shape[-1] ** -0.5
        self._q, self._k, self._softcap = q_NLGP, k_NLP, softcap
        self._tiles, self._kv_heads = tiles, kv_heads
        largest = max((self._numbers(tile) for tile in tiles), default=0)
        most = len(k_NLP) * largest if k_NLP.device.type != "cpu" else max(largest, BLOCK_NUMBERS)
        self._buffer = k_NLP.new_empty(most)
        self._tanh = self.empty_like() if softcap is not None else None

    def empty_like(self) -> Tensor:
        """Another buffer of the size that one part needs at most."""
        return torch.empty_like(self._buffer)

    def parts(self) -> Iterator[tuple[Tile, slice]]:
        """Every tile with every run of its heads (of N) whose scores fit the buffer."""
        for tile in self._tiles:
            begin, end = 0, len(self._k)
            if tile.row is not None:
                begin, end = tile.row * self._kv_heads, (tile.row + 1) * self._kv_heads
            at_once = max(1, len(self._buffer) // self._numbers(tile))
            for start in range(begin, end, at_once):
                yield tile, slice(start, min(start + at_once, end))

    def compute(self, tile: Tile, heads: slice) -> tuple[Tensor | None, Tensor]:
        """(tanh of the scores over the cap where there is one, weights): [n, R, K] each, R = Q*G, query by query.

        Both are overwritten by the next call.
        """
        q_nQGP = self._q[heads, tile.start : tile.stop]
        k_nKP = self._k[heads, tile.first : tile.stop]
        q_nRP = q_nQGP.flatten(1, 2)
        scores = _shaped(self._buffer, (len(k_nKP), q_nRP.shape[1], k_nKP.shape[1]))
        torch.baddbmm(scores, q_nRP, k_nKP.transpose(1, 2), beta=0, alpha=self.scale, out=scores)
        tanh = None
        if self._softcap is not None and self._tanh is not None:
            tanh = _shaped(self._tanh, scores.shape)
            torch.tanh(scores.div_(self._softcap), out=tanh)
            torch.mul(tanh, self._softcap, out=scores)
        scores_nQGK = scores.view(*q_nQGP.shape[:3], -1)
        for column, hidden_QK in tile.masks:
            part = scores_nQGK[..., column : column + hidden_QK.shape[1]]
            part.masked_fill_(hidden_QK.unsqueeze(1), -torch.inf)
        return tanh, torch.softmax(scores, -1, out=scores)

    def _numbers(self, tile: Tile) -> int:
        """Scores of one of N."""
        return (tile.stop - tile.start) * self._q.shape[2] * (tile.stop - tile.first)


def _clip_(weights: Tensor, clip: Clip) -> Tensor:
    gamma, zeta = clip
    return weights.mul_(zeta - gamma).add_(gamma).clamp_(0.0, 1.0)


def _shaped(buffer: Tensor, shape: tuple[int, int, int] | torch.Size) -> Tensor:
    return buffer[: shape[0] * shape[1] * shape[2]].view(shape)


def _by_head(x_LBHP: Tensor, kv_heads: int | None = None) -> Tensor:
    """[L, B, H, P] -> dense [N, L, G, P]; without ``kv_heads``, [L, B, J, P] -> [N, L, P]."""
    if kv_heads is None:
        return x_LBHP.permute(1, 2, 0, 3).contiguous().flatten(0, 1)
    return x_LBHP.unflatten(2, (kv_heads, -1)).permute(1, 2, 0, 3, 4).contiguous().flatten(0, 1)


def _by_position(x_NL: Tensor, batch_size: int) -> Tensor:
    """[N, L, ...] -> a view [L, B, J, ...]."""
    return x_NL.unflatten(0, (batch_size, -1)).movedim(2, 0)


def _by_query(y_nRP: Tensor, group: int) -> Tensor:
    """[n, Q*G, P] -> a view [Q, n, G, P]."""
    return y_nRP.unflatten(1, (-1, group)).transpose(0, 1)
