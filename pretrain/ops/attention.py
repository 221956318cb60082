"""Causal attention within documents, by the fastest way that device, precision and options allow.

Legend: L = sequence length, S = cached keys, B = batch, H = query heads, J = key/value heads (H/J neighbouring query
heads share one), P = head dim.

| way | where | what it needs |
|---|---|---|
| ``sdpa`` | any device | rows of one document, no window shorter than the row, no soft cap, no clipping |
| ``flash_attn`` | CUDA | half precision, head dim up to 256, no clipping, flash-attention installed |
| ``torch_varlen`` | CUDA | as ``flash_attn``, and no soft cap; comes with torch |
| ``blocked`` | any device | nothing: all options in float32 arithmetic |
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pretrain.ops.attention_blocked import Clip, blocked_attention, weights_of
from pretrain.ops.attention_flash import (
    HALF,
    MAX_HEAD_DIM,
    flash_attn_fault,
    flash_attn_kernel,
    torch_varlen_fault,
    torch_varlen_kernel,
    with_kernel,
)
from pretrain.ops.attention_tiles import Documents
from pretrain.ops.blocks import arithmetic_dtype

Way = Literal["sdpa", "flash_attn", "torch_varlen", "blocked"]


def causal_attention(
    q_LBHP: Tensor,
    k_LBJP: Tensor,
    v_LBJP: Tensor,
    documents: Documents,
    window: int | None = None,
    softcap: float | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """y_LBHP = weights(q k / sqrt(P)) v over the keys that each query sees; zero at padding.

    Args:
        documents: those of the rows; no query sees another document, or later keys.
        window: keys that a query sees at most, itself included; None for all of its document.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        clip: (gamma, zeta): weights w become clip((zeta - gamma) w + gamma, 0, 1) after the softmax (arXiv 2306.12929,
            eq. 4); gamma <= 0, so that what is hidden stays at zero.
    """
    if window is not None and window >= q_LBHP.shape[0]:
        window = None
    way = choose(q_LBHP.device.type, q_LBHP.dtype, q_LBHP.shape[-1], documents, window, softcap, clip)
    if way == "blocked":
        return blocked_attention(q_LBHP, k_LBJP, v_LBJP, documents, window, softcap, clip)
    if way == "sdpa":
        return _sdpa(q_LBHP, k_LBJP, v_LBJP, causal=q_LBHP.shape[0] > 1)
    kernel = flash_attn_kernel if way == "flash_attn" else torch_varlen_kernel
    return with_kernel(kernel, q_LBHP, k_LBJP, v_LBJP, documents, window, softcap)


def attend_to_all(
    q_LBHP: Tensor, k_SBJP: Tensor, v_SBJP: Tensor, softcap: float | None = None, clip: Clip | None = None
) -> Tensor:
    """y_LBHP with every key seen by every query: one new position against a cache. Arguments as above."""
    if softcap is None and clip is None:
        return _sdpa(q_LBHP, k_SBJP, v_SBJP, causal=False)
    group = q_LBHP.shape[2] // k_SBJP.shape[2]
    work = arithmetic_dtype(q_LBHP.dtype)
    q_BJLGP = q_LBHP.to(work).unflatten(2, (-1, group)).permute(1, 2, 0, 3, 4)
    k_BJSP, v_BJSP = (x.to(work).permute(1, 2, 0, 3) for x in (k_SBJP, v_SBJP))
    scores = torch.einsum("bjlgp,bjsp->bjlgs", q_BJLGP * q_LBHP.shape[-1] ** -0.5, k_BJSP)
    y_LBJGP = torch.einsum("bjlgs,bjsp->lbjgp", weights_of(scores, softcap, clip), v_BJSP)
    return y_LBJGP.flatten(2, 3).to(q_LBHP.dtype)


def choose(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    documents: Documents,
    window: int | None,
    softcap: float | None,
    clip: Clip | None,
) -> Way:
    """The way to compute (see the table above); ``window`` is shorter than the rows."""
    if window is None and softcap is None and clip is None and documents.runs is None:
        return "sdpa"
    if device_type == "cuda" and clip is None and dtype in HALF and head_dim <= MAX_HEAD_DIM:
        if flash_attn_fault() is None:
            return "flash_attn"
        if softcap is None and torch_varlen_fault() is None:
            return "torch_varlen"
    return "blocked"


def describe_ways() -> dict[str, str]:
    """For reports: each way of :func:`causal_attention` and whether this host has it."""
    no_cuda = None if torch.cuda.is_available() else "no CUDA device"
    found: dict[str, str | None] = {
        "sdpa": None,
        "flash_attn": flash_attn_fault() or no_cuda,
        "torch_varlen": torch_varlen_fault() or no_cuda,
        "blocked": None,
    }
    return {way: "available" if fault is None else fault for way, fault in found.items()}


def _sdpa(q_LBHP: Tensor, k_SBJP: Tensor, v_SBJP: Tensor, causal: bool) -> Tensor:
    q_BHLP, k_BJSP, v_BJSP = (x.permute(1, 2, 0, 3) for x in (q_LBHP, k_SBJP, v_SBJP))
    y_BHLP = F.scaled_dot_product_attention(
        q_BHLP, k_BJSP, v_BJSP, is_causal=causal, enable_gqa=q_LBHP.shape[2] != k_SBJP.shape[2]
    )
    return y_BHLP.permute(2, 0, 1, 3)
