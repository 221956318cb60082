"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """Sums over the target tokens of one micro-batch, to be divided by the denominator of the global batch.

    Attributes:
        loss_sum: fp32 scalar to differentiate, in nats.
        metrics: further fp32 scalar sums, detached.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss that is a sum over targets, so that it can be normalised over ranks and micro-batches."""

    def denominator(self, batch: Mapping[str, Any]) -> float:
        """Number of targets in a CPU batch (arrays or tensors); needs no model."""
        ...

    def __call__(self, model: Callable[..., Tensor], batch: Mapping[str, Tensor]) -> LossOutput:
        """Loss of one micro-batch that is already on the model's device."""
        ...
