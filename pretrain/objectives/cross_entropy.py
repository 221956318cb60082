"""Cross-entropy and log-normaliser row by row, in fp32, holding no second copy of the logits.

Shapes: R = rows (tokens), V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.blocks import arithmetic_dtype, row_blocks


def cross_entropy_rows(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and log-normaliser of each row.

    Only the logits (in their own precision) and one number a row are kept for backward; on CPU the work is
    done in blocks of rows that stay in the cache.

    Args:
        logits_RV: fp32, bf16 or float64.
        targets_R: int64 in [0, V).

    Returns:
        ``log(Z) - logits[target]`` and ``log(Z)``, both [R] in fp32 (float64 for float64 logits).
    """
    return _CrossEntropyRows.apply(logits_RV, targets_R)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        work = arithmetic_dtype(logits_RV.dtype)
        rows, vocab_size = logits_RV.shape
        log_z_R = logits_RV.new_empty(rows, dtype=work)
        for start, stop in row_blocks(0, rows, vocab_size, logits_RV.device):
            logits = logits_RV[start:stop].to(work)
            top = logits.amax(-1, keepdim=True)
            log_z_R[start:stop] = (logits - top).exp_().sum(-1).log_().add_(top.squeeze(-1))
        target_logits_R = logits_RV.gather(1, targets_R.unsqueeze(1)).squeeze(1).to(work)
        ctx.save_for_backward(logits_RV, targets_R, log_z_R)
        return log_z_R - target_logits_R, log_z_R.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_R: Tensor, dlog_z_R: Tensor) -> tuple[Tensor, None]:
        logits_RV, targets_R, log_z_R = ctx.saved_tensors
        rows, vocab_size = logits_RV.shape
        dlogits_RV = torch.empty_like(logits_RV, memory_format=torch.contiguous_format)
        weight_R1 = (dloss_R + dlog_z_R).unsqueeze(1)
        for start, stop in row_blocks(0, rows, vocab_size, logits_RV.device):
            softmax = (logits_RV[start:stop].to(log_z_R.dtype) - log_z_R[start:stop, None]).exp_()
            softmax.mul_(weight_R1[start:stop])
            softmax.scatter_add_(1, targets_R[start:stop, None], -dloss_R[start:stop, None])
            dlogits_RV[start:stop] = softmax
        return dlogits_RV, None
