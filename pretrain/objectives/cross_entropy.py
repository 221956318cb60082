"""Cross-entropy and log-normaliser row by row, in fp32, holding no second copy of the logits.

With a vocabulary split over tensor-parallel ranks, three numbers a row are reduced over the ranks in the forward pass
(Shoeybi et al., arXiv 1909.08053, section 3); the backward pass needs no communication.

Shapes: R = rows (tokens), V = vocabulary (the local part of it where it is split).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.blocks import arithmetic_dtype, row_blocks
from pretrain.parallel.vocabulary import VocabularyShard


def cross_entropy_rows(
    logits_RV: Tensor, targets_R: Tensor, vocabulary: VocabularyShard | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and log-normaliser of each row.

    Only the logits (in their own precision) and one number a row are kept for backward; on CPU the work is
    done in blocks of rows that stay in the cache.

    Args:
        logits_RV: fp32, bf16 or float64.
        targets_R: int64 in [0, size of the whole vocabulary).
        vocabulary: which columns of the whole logits these are; the same rows go in on each of its ranks.

    Returns:
        ``log(Z) - logits[target]`` and ``log(Z)``, both [R] in fp32 (float64 for float64 logits), equal on all ranks
        of ``vocabulary``.
    """
    return _CrossEntropyRows.apply(logits_RV, targets_R, vocabulary)


class _CrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, targets_R: Tensor, vocabulary: VocabularyShard | None
    ) -> tuple[Tensor, Tensor]:
        work = arithmetic_dtype(logits_RV.dtype)
        rows, vocab_size = logits_RV.shape
        log_z_R = logits_RV.new_empty(rows, dtype=work)
        for start, stop in row_blocks(0, rows, vocab_size, logits_RV.device):
            logits = logits_RV[start:stop].to(work)
            top = logits.amax(-1, keepdim=True)
            log_z_R[start:stop] = (logits - top).exp_().sum(-1).log_().add_(top.squeeze(-1))
        if vocabulary is None:
            elsewhere_R = None
            target_logits_R = _at(logits_RV, targets_R).to(work)
        else:
            elsewhere_R = (targets_R < vocabulary.start) | (targets_R >= vocabulary.stop)
            targets_R = (targets_R - vocabulary.start).masked_fill_(elsewhere_R, 0)
            target_logits_R = _at(logits_RV, targets_R).to(work).masked_fill_(elsewhere_R, 0.0)
            log_z_R, target_logits_R = _reduced(log_z_R, target_logits_R, vocabulary)
        ctx.save_for_backward(logits_RV, targets_R, log_z_R, elsewhere_R)
        return log_z_R - target_logits_R, log_z_R.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_R: Tensor, dlog_z_R: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, targets_R, log_z_R, elsewhere_R = ctx.saved_tensors
        rows, vocab_size = logits_RV.shape
        dlogits_RV = torch.empty_like(logits_RV, memory_format=torch.contiguous_format)
        weight_R1 = (dloss_R + dlog_z_R).unsqueeze(1)
        dtarget_R = -dloss_R if elsewhere_R is None else (-dloss_R).masked_fill_(elsewhere_R, 0.0)
        for start, stop in row_blocks(0, rows, vocab_size, logits_RV.device):
            softmax = (logits_RV[start:stop].to(log_z_R.dtype) - log_z_R[start:stop, None]).exp_()
            softmax.mul_(weight_R1[start:stop])
            softmax.scatter_add_(1, targets_R[start:stop, None], dtarget_R[start:stop, None])
            dlogits_RV[start:stop] = softmax
        return dlogits_RV, None, None


def _at(logits_RV: Tensor, columns_R: Tensor) -> Tensor:
    return logits_RV.gather(1, columns_R.unsqueeze(1)).squeeze(1)


def _reduced(log_z_R: Tensor, target_logits_R: Tensor, vocabulary: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Log-normaliser and target logit over the whole vocabulary, from each rank's part of it."""
    top_R = log_z_R.clone()
    dist.all_reduce(top_R, dist.ReduceOp.MAX, group=vocabulary.group)
    sums_2R = torch.stack([(log_z_R - top_R).exp_(), target_logits_R])
    dist.all_reduce(sums_2R, group=vocabulary.group)
    return sums_2R[0].log().add_(top_R), sums_2R[1]
