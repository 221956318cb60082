"""Variable-length attention kernels for CUDA: flash-attention's, or the one that comes with torch.

Both take the tokens of all documents without padding, one after the other, and where each document begins. They work
in half precision; neither knows clipped softmax, and torch's knows no soft cap.

Legend: L = sequence length, B = batch, T = tokens without padding, H = query heads, J = key/value heads, P = head dim.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pretrain.ops.attention_tiles import Documents

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

Kernel = Callable[..., Tensor]
"""(q_THP, k_TJP, v_TJP, documents, window, softcap) to y_THP."""


def flash_attn_kernel(
    q_THP: Tensor, k_TJP: Tensor, v_TJP: Tensor, documents: Documents, window: int | None, softcap: float | None
) -> Tensor:
    """By ``flash_attn.flash_attn_varlen_func`` (2.6 or newer). Its window counts the keys before the query only."""
    longest = max(documents.lengths)
    output: Tensor = _flash_attn()(
        q_THP,
        k_TJP,
        v_TJP,
        cu_seqlens_q=documents.cu_seqlens,
        cu_seqlens_k=documents.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=0.0,
        softmax_scale=q_THP.shape[-1] ** -0.5,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def torch_varlen_kernel(
    q_THP: Tensor, k_TJP: Tensor, v_TJP: Tensor, documents: Documents, window: int | None, softcap: float | None
) -> Tensor:
    """By ``torch.nn.attention.varlen.varlen_attn``: causal is a window without end before a query and none after."""
    assert softcap is None, "torch's kernel has no soft cap"
    longest = max(documents.lengths)
    output: Tensor = _torch_varlen()(
        q_THP,
        k_TJP,
        v_TJP,
        documents.cu_seqlens,
        documents.cu_seqlens,
        longest,
        longest,
        scale=q_THP.shape[-1] ** -0.5,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THP.shape[1] != k_TJP.shape[1],
    )
    return output


def with_kernel(
    kernel: Kernel,
    q_LBHP: Tensor,
    k_LBJP: Tensor,
    v_LBJP: Tensor,
    documents: Documents,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """y_LBHP: padding taken out before ``kernel`` and zero afterwards."""
    length, batch_size = q_LBHP.shape[:2]
    index_T = documents.token_index_T
    tokens = [x.flatten(0, 1) if index_T is None else x.flatten(0, 1)[index_T] for x in (q_LBHP, k_LBJP, v_LBJP)]
    if not len(tokens[0]):
        return q_LBHP * 0.0
    y_THP = kernel(*(x.contiguous() for x in tokens), documents, window, softcap)
    if index_T is not None:
        y_THP = y_THP.new_zeros(length * batch_size, *y_THP.shape[1:]).index_copy(0, index_T, y_THP)
    return y_THP.unflatten(0, (length, batch_size))


@cache
def _flash_attn() -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function


@cache
def _torch_varlen() -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function


@cache
def flash_attn_fault() -> str | None:
    """Why flash-attention cannot be used on this host; None when it can."""
    try:
        version = importlib.metadata.version("flash_attn")
        _flash_attn()
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install flash-attn)"
    except (ImportError, AttributeError, OSError) as fault:
        return f"installed, but cannot be loaded: {fault}"
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (2, 6):
        return f"version {version} is too old, 2.6 or newer is needed"
    return None


@cache
def torch_varlen_fault() -> str | None:
    """Why torch's kernel cannot be used on this host; None when it can."""
    try:
        _torch_varlen()
    except (ImportError, AttributeError) as fault:
        return f"torch {torch.__version__} has none: {fault}"
    return None
