"""Fragment: the unit in which engines exchange canonical state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pretrain.parallel.shard import Shard


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + values.numel())`` of ``shard`` of the logical tensor ``name`` in ``slot``.

    ``shape`` is the whole logical shape; ``start`` counts elements of the shard in its own row-major order (for an
    unsplit tensor: of the tensor). ``values`` is 1-D, on any device, usually a view of the engine's own storage.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    shard: Shard
