"""Muon beside AdamW in one optimizer.

Matrices between hidden features step along their orthogonalised momentum (Keller Jordan,
https://kellerjordan.github.io/posts/muon/), scaled so that learning rate and weight decay of AdamW carry over
(Moonlight, arXiv 2502.16982, equation 4); everything else steps as in torch's AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.exchange import MatrixExchange, Share
from pretrain.parallel.late_compiler import step_without_compiler

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic x -> a x + b x^3 + c x^5, steepest at 0: five rounds bring singular values into about [0.7, 1.2]."""
EPS = 1e-7
"""Smallest Frobenius norm that a matrix is divided by."""
RMS = 0.2
"""Root mean square of AdamW's updates in practice (Moonlight, section 2.2)."""
MOMENTUM = "momentum_buffer"
"""Muon's slot of state, under torch's name."""
IS_MUON = "is_muon"
"""Key of a parameter group whose matrices take Muon."""

_adamw_step = step_without_compiler(torch.optim.AdamW)


def orthogonalise(update: Tensor, steps: int) -> Tensor:
    """About U V^T of the update [rows, columns] = U S V^T, by Newton-Schulz iteration in the update's dtype."""
    a, b, c = COEFFICIENTS
    is_tall = update.size(0) > update.size(1)
    x = update.T if is_tall else update
    # The Frobenius norm bounds the largest singular value, and the iteration converges from at most 1.
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def update_scale(shape: tuple[int, int]) -> float:
    """What an orthogonal matrix is multiplied with to have the root mean square of AdamW's updates."""
    return RMS * math.sqrt(max(shape))


class MuonAdamW(torch.optim.AdamW):
    """Groups with ``is_muon`` take Muon, the others torch's AdamW, with their own ``lr`` and ``weight_decay``.

    Engines replace the parameters of groups by the fragments that this process steps, and then say with
    :meth:`attach` where these lie in the model's parameters; without a word parameters are whole.

    Args:
        groups: parameter groups as for AdamW; a group of matrices has ``is_muon=True``.
        momentum: decay of the momentum (Nesterov).
        newton_schulz_steps: rounds of the iteration.
        newton_schulz_dtype: in which it computes.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        momentum: float,
        newton_schulz_steps: int,
        newton_schulz_dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._momentum = momentum
        self._steps = newton_schulz_steps
        self._dtype = newton_schulz_dtype
        self._exchanges: list[MatrixExchange] = []
        self._turns: Sequence[Tensor] = ()

    def attach(
        self, shares: Iterable[Share], group: Any, device: torch.device, turns: Sequence[Tensor] | None = None
    ) -> None:
        """Say where the tensors of Muon's groups lie in parameters. Collective over ``group``.

        Args:
            shares: what this rank steps.
            group: ranks that step pieces or copies of the same matrices; None for this process alone.
            device: where matrices are orthogonalised.
            turns: an engine that calls :meth:`step` for one tensor at a time gives these tensors, in the order that is
                the same on all ranks.
        """
        held = list(shares)
        if turns is None:
            self._exchanges = [MatrixExchange(held, group, device)]
        else:
            self._turns = turns
            self._exchanges = [
                MatrixExchange([share for share in held if share.key is key], group, device) for key in turns
            ]

    def slots(self, key: Tensor) -> tuple[str, ...]:
        """Names of the flat state that a tensor of the groups has."""
        if self._turns:  # groups are empty between steps
            is_muon = any(
                key is turn and not self._exchanges[number].is_empty for number, turn in enumerate(self._turns)
            )
        else:
            is_muon = any(key is tensor for group in self._muon_groups() for tensor in group["params"])
        return (MOMENTUM,) if is_muon else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(IS_MUON)]
        try:
            loss = _adamw_step(self, closure)
        finally:
            self.param_groups = groups
        self._muon_step()
        return loss

    def _muon_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get(IS_MUON)]

    def _muon_step(self) -> None:
        assert self._exchanges or not self._muon_groups(), "attach() tells where the matrices are"
        group_of: dict[Tensor, Mapping[str, Any]] = {}
        for group in self._muon_groups():
            for key in group["params"]:
                group_of[key] = group
                self._accumulate(key, self._gradient(key))
                key.mul_(1 - group["lr"] * group["weight_decay"])

        def read(key: Tensor, offset: int, numel: int) -> Tensor:
            span = slice(offset, offset + numel)
            momentum = self.state[key][MOMENTUM].view(-1)[span]
            return torch.lerp(self._gradient(key).reshape(-1)[span], momentum, self._momentum)

        def write(key: Tensor, offset: int, values: Tensor, shape: tuple[int, int]) -> None:
            target = key.view(-1)[offset : offset + values.numel()]
            target.add_(values.to(key.device), alpha=-group_of[key]["lr"] * update_scale(shape))

        for number, exchange in enumerate(self._exchanges):
            if not self._turns or self._turns[number] in group_of:
                exchange.run(read, lambda matrix: orthogonalise(matrix, self._steps), write, self._dtype)

    def _accumulate(self, key: Tensor, gradient: Tensor) -> None:
        state = self.state[key]
        if MOMENTUM not in state:
            state["step"] = torch.tensor(0.0)
            state[MOMENTUM] = torch.zeros_like(key, memory_format=torch.preserve_format)
        state["step"] += 1
        state[MOMENTUM].lerp_(gradient, 1 - self._momentum)

    @staticmethod
    def _gradient(key: Tensor) -> Tensor:
        """The gradient; zeros for a parameter that no loss has reached, as every rank has to take part."""
        return torch.zeros_like(key) if key.grad is None else key.grad
