"""The engine seam: what the training loop needs from a back end, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.nn.auxiliary import LayerReport

Batch = dict[str, Tensor]
LossFunction = Callable[[Callable[..., Tensor], Batch], Any]
Accept = Callable[["StepResult"], bool]
"""Whether the update of a step is to be made, from what is known of the step before it: the gate of ``train_step``."""


@dataclass
class StepResult:
    """Outcome of one optimizer step on this rank.

    ``loss_sum`` is the sum of nats over this rank's target tokens; ``grad_norm`` is the global norm before clipping;
    ``seconds`` holds the wall time of ``forward``, ``backward`` and ``optimizer``. ``layers`` is what layers of this
    rank count by themselves (routers), on every rank of a model that has such layers.
    """

    loss_sum: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: LayerReport | None = None


@dataclass
class EvalResult:
    """Sums over the target tokens of one batch: of the loss (nats), and of what else the objective reports."""

    loss_sum: float
    metrics: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model with its optimizer on some back end and layout.

    ``module`` is the plain module for generation, or None where no rank holds the whole model. ``dp_rank`` and
    ``dp_size`` place this rank in the data-parallel group. Ranks that share a data-parallel index work on the same
    micro-batches; exactly one of them has ``is_data_leader`` set and answers for their sums. ``num_parameters`` counts
    the whole model. ``parts`` are the modules of it that run on this rank.
    """

    module: nn.Module | None
    parts: Sequence[nn.Module]
    device: torch.device
    dp_rank: int
    dp_size: int
    is_data_leader: bool
    num_parameters: int

    def train_step(
        self,
        microbatches: Sequence[Batch],
        loss: LossFunction,
        denominator: float,
        learning_rate: float,
        accept: Accept | None = None,
    ) -> StepResult:
        """Forward and backward of this rank's micro-batches, one optimizer step.

        The gradient is that of (sum of losses over all ranks and micro-batches) / ``denominator``, the global number
        of target tokens. ``loss_sum`` and ``metrics`` of a rank that is no data leader are 0.

        ``accept`` is called once, on every rank, with the result (``seconds`` still empty) when the global gradient
        norm is known and nothing has changed yet; all ranks must answer alike. After False the step leaves no trace:
        weights, buffers, optimizer state and its step count are those from before. Without it every update is made.
        """
        ...

    def gradients(self) -> Iterator[Fragment]:
        """This rank's share of the step's gradient before clipping, slot ``gradient``; only while ``accept`` runs."""
        ...

    def eval_step(self, batch: Batch, loss: LossFunction) -> EvalResult:
        """Sums of one batch, without gradients; all 0, under the same names, where the rank is no data leader.

        Collective: every rank calls it equally often, with a batch of the same number of rows.
        """
        ...

    def export_state(self) -> Iterator[Fragment]:
        """This rank's share of the canonical state; over all ranks the fragments tile every logical tensor once."""
        ...

    def scalar_state(self) -> dict[str, float]:
        """Optimizer state that is one number for the whole model (Adam's step count)."""
        ...

    def import_state(self, reader: CheckpointReader) -> None:
        """Take over weights, masters, moments and scalars from a canonical checkpoint of any layout."""
        ...
