"""Whether the most likely token is the target, token by token and answer by answer.

Shapes: B = batch, L = sequence length, R = rows (tokens), V = vocabulary (the local part of it where it is split).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.parallel.vocabulary import VocabularyShard


@torch.no_grad()
def most_likely_tokens(logits_RV: Tensor, vocabulary: VocabularyShard | None = None) -> Tensor:
    """int64 [R]: the token of the largest logit; any one of them where several are equal.

    ``vocabulary`` says which columns of the whole logits these are; all its ranks get the same answer.
    """
    if not len(logits_RV):
        return logits_RV.new_zeros(0, dtype=torch.int64)
    top_R, tokens_R = logits_RV.max(-1)
    if vocabulary is None:
        return tokens_R
    whole_R = top_R.float().clone()
    dist.all_reduce(whole_R, dist.ReduceOp.MAX, group=vocabulary.group)
    elsewhere_R = top_R < whole_R
    tokens_R = (tokens_R + vocabulary.start).masked_fill_(elsewhere_R, torch.iinfo(torch.int64).max)
    dist.all_reduce(tokens_R, dist.ReduceOp.MIN, group=vocabulary.group)
    return tokens_R


def hits(logits_LBV: Tensor, targets_LB: Tensor, mask_LB: Tensor, vocabulary: VocabularyShard | None) -> Tensor:
    """bool [L, B]: targets (where ``mask_LB``) that are the most likely token. Logits elsewhere are not read."""
    chosen = mask_LB.flatten().nonzero().squeeze(1)
    hits_R = torch.zeros(mask_LB.numel(), dtype=torch.bool, device=mask_LB.device)
    hits_R[chosen] = most_likely_tokens(logits_LBV.flatten(0, 1)[chosen], vocabulary) == targets_LB.flatten()[chosen]
    return hits_R.view(mask_LB.shape)


def whole_answers(hits_LB: Tensor, mask_LB: Tensor, seq_idx_LB: Tensor) -> Tensor:
    """bool [L, B]: targets of answers that are right as a whole.

    An answer is a run of neighbouring targets of one document. Its hits count as many times as it has targets, so the
    mean over targets is the share of right answers when answers are equally long, and weighs them by length otherwise.
    """
    begins_LB = mask_LB.clone()
    begins_LB[1:] &= ~mask_LB[:-1] | (seq_idx_LB[1:] != seq_idx_LB[:-1])
    # Numbers of answers, row after row of the batch; misses are counted for each.
    numbers_BL = begins_LB.t().flatten().cumsum(0)
    misses = torch.zeros(int(numbers_BL.numel()) + 1, dtype=torch.int64, device=hits_LB.device)
    misses.index_add_(0, numbers_BL, (mask_LB & ~hits_LB).t().flatten().long())
    right_BL = (misses[numbers_BL] == 0).view(mask_LB.shape[1], mask_LB.shape[0])
    return right_BL.t() & mask_LB
