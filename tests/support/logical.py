"""Logical tensors of a model by canonical name."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.parallel.canonical import canonical_parameters


def logical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Views of every logical tensor inside the stored parameters."""
    return {part.name: p.view(part) for p in canonical_parameters(model) for part in p.parts}
