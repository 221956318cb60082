"""Mixture of experts: top-k routing without capacity, grouped matrix products, losses that balance the router.

Router and top-k as in Mixtral (arXiv 2401.04088: softmax scores) or DeepSeek-V3 (arXiv 2412.19437, eq. 12-16: sigmoid
scores), with a shared expert. Load-balancing loss of each sequence: DeepSeek-V3, eq. 17-20, which is the Switch
Transformer's (arXiv 2101.03961, eq. 4-6) within one row; router z-loss: ST-MoE (arXiv 2202.08906, eq. 5). Both are sums
over tokens, so they do not depend on how rows are dealt to micro-batches and ranks.

Shapes: L = sequence length (a share of it between layers under sequence parallelism), B = batch, D = model width,
E = experts, K = experts of a token, F = hidden features of an expert (this rank's share), R = L * B tokens,
S = R * K slots sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.nn.auxiliary import AuxiliaryLoss
from pretrain.nn.initialisation import Initialiser, normal
from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mlp import MLP
from pretrain.nn.moe_config import MoEConfig
from pretrain.ops.blocks import arithmetic_dtype
from pretrain.ops.grouped_matmul import Dispatch, dispatch, expert_in, expert_out, weighted_activation
from pretrain.parallel.layers import ParallelLayers, exempt_from_muon, keep_fp32, stack_of_matrices


class MoE(nn.Module):
    """Routed experts and, optionally, a shared one: x_LBD -> y_LBD.

    With tensor parallelism every rank holds a share of the hidden features of every expert; the router is held whole
    and works on hidden states between layers, so on a share of the sequence under sequence parallelism.

    Args:
        width: D.
        config: sizes of the whole model.
    """

    def __init__(self, layers: ParallelLayers, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self._layers = layers
        hidden = layers.local(config.hidden(width))
        self.router = Router(layers, width, config.num_experts)
        self.gate = ExpertIn(layers, config.num_experts, hidden, width) if config.activation == "swiglu" else None
        self.up = ExpertIn(layers, config.num_experts, hidden, width)
        self.down = ExpertOut(layers, config.num_experts, hidden, width)
        self.shared = None if config.shared is None else MLP(layers, width, config.shared)
        # Without sequence parallelism all tensor-parallel ranks route the same tokens.
        counts = layers.sequence_parallel or layers.tensor_rank == 0
        self.auxiliary = AuxiliaryLoss(config.num_experts + 3, router_metrics, counts)

    def initialisers(self, std: float, out_std: float) -> dict[str, Initialiser]:
        """Normal weights, ``out_std`` for the projections that write to the residual stream."""
        weights = {"router.weight": normal(std), "up.weight": normal(std), "down.weight": normal(out_std)}
        if self.gate is not None:
            weights["gate.weight"] = normal(std)
        if self.shared is not None:
            weights |= {f"shared.{name}": fill for name, fill in self.shared.initialisers(std, out_std).items()}
        return weights

    def init_cache(self, *_: object) -> None:
        """Experts remember nothing."""
        return

    def forward(self, x_LBD: Tensor, layout: SequenceLayout, cache: None = None) -> Tensor:
        """Apply to every position alone. Padding goes through experts as well, but takes no part in the losses."""
        logits_LBE = self.router(x_LBD)
        scores_LBE = logits_LBE.softmax(-1) if self.config.router == "softmax" else logits_LBE.sigmoid()
        weights_LBK, experts_LBK = scores_LBE.topk(self.config.top_k, dim=-1)
        if torch.is_grad_enabled() and weights_LBK.requires_grad:
            real_LB = _real(layout, len(x_LBD), self._layers)
            loss, numbers = self._losses(logits_LBE, scores_LBE, experts_LBK, real_LB)
            weights_LBK = self.auxiliary.attach(weights_LBK, loss, numbers)
        if self.config.normalise_top_k:
            weights_LBK = weights_LBK / (weights_LBK.sum(-1, keepdim=True) + 1e-20)
        weights_LBK = weights_LBK * self.config.routed_scale
        y_LBD = self._routed(x_LBD, weights_LBK, experts_LBK)
        return y_LBD if self.shared is None else y_LBD + self.shared(x_LBD, layout)

    def _routed(self, x_LBD: Tensor, weights_LBK: Tensor, experts_LBK: Tensor) -> Tensor:
        """Weighted sum of the outputs of each token's experts."""
        layers, top_k = self._layers, self.config.top_k
        inside_LBD = layers.enter(x_LBD)
        # Each rank's share of the features gives a part of the weights' gradient: `enter` adds the parts up.
        plan = dispatch(layers.enter(experts_LBK).reshape(-1, top_k), self.config.num_experts)
        weight_S = layers.enter(weights_LBK).flatten().index_select(0, plan.order_S)
        x_RD = inside_LBD.flatten(0, 1)
        gate_SF = None if self.gate is None else self.gate(x_RD, plan)
        h_SF = weighted_activation(self.config.activation, self.up(x_RD, plan), gate_SF, weight_S)
        return layers.leave(self.down(h_SF, plan).view_as(inside_LBD))

    def _losses(
        self, logits_LBE: Tensor, scores_LBE: Tensor, experts_LBK: Tensor, real_LB: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss (a sum over tokens), and the numbers to report: [E + 3] tokens of each expert,
        balance loss and z-loss (sums over tokens without weights), tokens.

        Of a row with T tokens the balance loss is T * sum_e f_e P_e, with f_e = E / (K T) times the tokens sent to
        expert e, and P_e the mean of its scores, scaled to sum to 1 for each token. It is 1 for each token when all
        experts get the same.
        """
        config = self.config
        ones_LBK = torch.ones_like(experts_LBK, dtype=logits_LBE.dtype)
        if real_LB is not None:
            ones_LBK = ones_LBK * real_LB.unsqueeze(-1)
        batch_size, num_experts = logits_LBE.shape[1:]
        sent_BE = ones_LBK.new_zeros(batch_size, num_experts).scatter_add_(
            1, experts_LBK.transpose(0, 1).flatten(1), ones_LBK.transpose(0, 1).flatten(1)
        )
        # The share of the sequence that lies here: the counts of the whole sequence need no gradient.
        sums_BE = self._layers.sum_inside(sent_BE.clone()) if self._layers.sequence_parallel else sent_BE
        tokens_B1 = sums_BE.sum(1, keepdim=True).clamp(min=1) / config.top_k
        load_BE = sums_BE * (num_experts / config.top_k) / tokens_B1
        # A loss without weight is reported, and keeps nothing for the backward pass.
        with torch.set_grad_enabled(config.balance_loss > 0):
            shares_LBE = scores_LBE
            if config.router == "sigmoid":
                shares_LBE = scores_LBE / (scores_LBE.sum(-1, keepdim=True) + 1e-20)
            balance_LB = (shares_LBE * load_BE).sum(-1)
        with torch.set_grad_enabled(config.z_loss > 0):
            log_z_LB = logits_LBE.logsumexp(-1)
        if real_LB is not None:
            balance_LB = balance_LB.masked_fill(~real_LB, 0.0)
            log_z_LB = log_z_LB.masked_fill(~real_LB, 0.0)
        balance, z = balance_LB.sum(), log_z_LB.square().sum()
        tokens = sent_BE.sum() / config.top_k
        numbers = torch.cat([sent_BE.sum(0), torch.stack([balance.detach(), z.detach(), tokens])])
        return config.balance_loss * balance + config.z_loss * z, numbers


class Router(nn.Module):
    """Logits of every expert, in fp32 whatever the precision: x_LBD -> [L, B, E]."""

    def __init__(self, layers: ParallelLayers, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = layers.replicated(keep_fp32(exempt_from_muon(nn.Parameter(torch.empty(num_experts, width)))))

    def forward(self, x_LBD: Tensor) -> Tensor:
        return _RouterLogits.apply(x_LBD, self.weight)


class ExpertIn(nn.Module):
    """A projection into the hidden features of every expert: x_RD -> h_SF."""

    def __init__(self, layers: ParallelLayers, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.weight = layers.own(stack_of_matrices(nn.Parameter(torch.empty(num_experts, hidden, width))), dim=1)

    def forward(self, x_RD: Tensor, plan: Dispatch) -> Tensor:
        return expert_in(x_RD, self.weight, plan)


class ExpertOut(nn.Module):
    """The projection out of the hidden features of every expert, added up for each token: h_SF -> y_RD."""

    def __init__(self, layers: ParallelLayers, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.weight = layers.own(stack_of_matrices(nn.Parameter(torch.empty(num_experts, width, hidden))), dim=2)

    def forward(self, h_SF: Tensor, plan: Dispatch) -> Tensor:
        return expert_out(h_SF, self.weight, plan)


class _RouterLogits(torch.autograd.Function):
    """Product in fp32 that keeps its operands as they come."""

    @staticmethod
    def forward(ctx: Any, x_LBD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_LBD, weight_ED)
        work = arithmetic_dtype(x_LBD.dtype)
        return x_LBD.to(work) @ weight_ED.to(work).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_LBE: Tensor) -> tuple[Tensor, Tensor]:
        x_LBD, weight_ED = ctx.saved_tensors
        dx_LBD = dlogits_LBE @ weight_ED.to(dlogits_LBE.dtype)
        dweight_ED = dlogits_LBE.flatten(0, 1).t() @ x_LBD.flatten(0, 1).to(dlogits_LBE.dtype)
        return dx_LBD.to(x_LBD.dtype), dweight_ED.to(weight_ED.dtype)


def router_metrics(layers: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over the MoE layers from the numbers of :meth:`MoE._losses`, summed over a global batch.

    ``router_balance_loss`` and ``router_z_loss``: mean for each token, without weights; the former is 1 when every
    sequence uses all experts alike. ``busiest_expert``: tokens of the busiest expert of a layer, relative to the mean.
    """
    totals = dict.fromkeys(("router_balance_loss", "router_z_loss", "busiest_expert"), 0.0)
    for numbers in layers:
        *sent_E, balance, z, tokens = numbers
        totals["router_balance_loss"] += balance / max(tokens, 1.0)
        totals["router_z_loss"] += z / max(tokens, 1.0)
        totals["busiest_expert"] += max(sent_E) * len(sent_E) / max(sum(sent_E), 1.0)
    return {name: total / len(layers) for name, total in totals.items()}


def _real(layout: SequenceLayout, length: int, layers: ParallelLayers) -> Tensor | None:
    """Which of the ``length`` positions that lie here are no padding; None for all."""
    if layout.seq_idx_LB is None:
        return None
    start = layers.tensor_rank * length if layers.sequence_parallel else 0
    return layout.seq_idx_LB[start : start + length] >= 0
