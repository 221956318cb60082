"""Handing a model the choice of what it keeps for the backward pass."""

from __future__ import annotations

from torch import nn


def set_activation_checkpointing(model: nn.Module, policy: str) -> None:
    """Tell ``model`` to compute its layers again in the backward pass (``layers``) or not (``none``).

    Raises:
        ValueError: it is asked of a model that does not offer it.
    """
    if policy == "none":
        return
    if not hasattr(model, "activation_checkpointing"):
        raise ValueError(
            f"train.activation_checkpointing: found {policy}, but {type(model).__name__} has no attribute "
            "activation_checkpointing by which it could be told to compute its layers again in the backward pass; "
            "give it one that its forward pass honours, or set train.activation_checkpointing=none"
        )
    model.activation_checkpointing = True  # type: ignore[assignment]
