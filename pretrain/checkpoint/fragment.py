"""Fragment: the unit in which engines exchange canonical state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Flat elements ``[start, start + values.numel())`` of logical tensor ``name`` in ``slot``.

    ``shape`` is the whole logical shape; ``values`` is 1-D, on any device, usually a view of the engine's own storage.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
