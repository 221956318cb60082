"""Next-token prediction over packed documents.

Shapes: B = batch, L = sequence length, V = vocabulary, R = L * B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.accuracy import hits, whole_answers
from pretrain.objectives.cross_entropy import cross_entropy_rows
from pretrain.objectives.protocol import LossOutput
from pretrain.parallel.vocabulary import VocabularyShard


class NextTokenObjective:
    """Cross-entropy in nats, summed over the tokens that ``loss_mask`` selects, computed in fp32.

    With ``z_loss`` > 0, ``z_loss * log(Z)^2`` per target is added whenever gradients are recorded; evaluation
    under ``torch.no_grad`` stays the pure cross-entropy, so that it converts to bits per byte.

    With ``accuracy`` the metric of that name is the share of targets that are the most likely token, with
    ``exact_match`` the share of targets in answers that are right as a whole
    (:func:`pretrain.objectives.accuracy.whole_answers`), in training and in validation.
    """

    vocabulary_parallel = True
    """Computed on each tensor-parallel rank's part of the logits; engines gather them for objectives without this."""

    likelihood = True
    """In evaluation the loss is the negative log-likelihood of the targets, so it has a perplexity."""

    def __init__(self, z_loss: float = 0.0, accuracy: bool = False, exact_match: bool = False) -> None:
        self.z_loss = z_loss
        self.accuracy = accuracy
        self.exact_match = exact_match

    def denominator(self, batch: Mapping[str, Any]) -> float:
        """Number of target tokens, ``batch["loss_mask"].sum()``."""
        return float(batch["loss_mask"].sum())

    def __call__(self, model: Callable[..., Tensor], batch: Mapping[str, Tensor]) -> LossOutput:
        """Loss of one micro-batch.

        Args:
            model: called as ``model(tokens_LB, seq_idx_LB, position_ids_LB)``, returns logits_LBV; those of a
                part of the vocabulary if its attribute ``vocabulary`` names one.
            batch: ``tokens``, ``targets``, ``loss_mask`` [B, L]; ``seq_idx`` and ``position_ids`` [B, L],
                as in :meth:`pretrain.models.hybrid.model.HybridLM.forward`.

        Returns:
            ``loss_sum``; with z-loss in training, ``metrics`` holds its parts ``cross_entropy`` and
            ``z_loss``; with ``accuracy`` and ``exact_match`` also these, as sums over targets.
        """
        tokens_LB = batch["tokens"].t().long()
        targets_LB = batch["targets"].t().long()
        seq_idx_LB = batch["seq_idx"].t()
        logits_LBV = model(
            tokens_LB,
            None if _single_documents(seq_idx_LB) else seq_idx_LB,
            batch["position_ids"].t(),
        )
        mask_R = batch["loss_mask"].t().flatten()
        targets_R = targets_LB.flatten().masked_fill(~mask_R, 0)
        vocabulary = getattr(model, "vocabulary", None)
        loss_R, log_z_R = cross_entropy_rows(logits_LBV.flatten(0, 1), targets_R, vocabulary)
        cross_entropy = loss_R.masked_fill(~mask_R, 0.0).sum()
        metrics = self._hits(logits_LBV.detach(), targets_LB, batch, vocabulary)
        if self.z_loss == 0 or not torch.is_grad_enabled():
            return LossOutput(cross_entropy, metrics)
        z_loss = self.z_loss * log_z_R.masked_fill(~mask_R, 0.0).square().sum()
        parts = {"cross_entropy": cross_entropy.detach(), "z_loss": z_loss.detach()}
        return LossOutput(cross_entropy + z_loss, parts | metrics)

    def _hits(
        self, logits_LBV: Tensor, targets_LB: Tensor, batch: Mapping[str, Tensor], vocabulary: VocabularyShard | None
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        if self.accuracy or self.exact_match:
            mask_LB = batch["loss_mask"].t()
            hits_LB = hits(logits_LBV, targets_LB, mask_LB, vocabulary)
            if self.accuracy:
                metrics["accuracy"] = hits_LB.sum().float()
            if self.exact_match:
                metrics["exact_match"] = whole_answers(hits_LB, mask_LB, batch["seq_idx"].t()).sum().float()
        return metrics


def _single_documents(seq_idx_LB: Tensor) -> bool:
    """Whether every row is one document without padding, so that masks can be left out.

    Looked up on the CPU only, where reading the answer does not wait for a device.
    """
    return seq_idx_LB.device.type == "cpu" and not bool(seq_idx_LB.any())
