"""Stage: the part of a model that one pipeline chunk holds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Layers ``[first, stop)`` by global index, with the embedding on the first and the head on the last stage."""

    first: int
    stop: int
    has_embedding: bool
    has_head: bool

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """The only stage of an unsplit model."""
        return cls(0, num_layers, True, True)
