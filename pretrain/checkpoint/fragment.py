"""Fragment: the unit in which engines exchange canonical state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        assert len(shape) == 1, f"{self.name}: values of a fragment are 1-D, found shape {shape}"

    @property
    def numel(self) -> int:
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


class LazyFragment(Fragment):
    """A fragment whose ``values`` are made by ``read`` whenever they are asked for, and not kept: for state of which no
    view can be had, so that a list of fragments does not hold a copy of all of it."""

    def __init__(
        self,
        name: str,
        slot: str,
        shape: tuple[int, ...],
        start: int,
        shard: Shard,
        numel: int,
        dtype: torch.dtype,
        read: Callable[[], Tensor],
    ) -> None:
        fields = {"name": name, "slot": slot, "shape": shape, "start": start, "shard": shard}
        # Past the frozen dataclass, whose own constructor would want the values.
        self.__dict__.update(fields | {"_numel": numel, "_dtype": dtype, "_read": read})

    @property
    def values(self) -> Tensor:
        made: Tensor = self.__dict__["_read"]()
        return made

    @property
    def numel(self) -> int:
        return int(self.__dict__["_numel"])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.__dict__["_dtype"]
        return dtype
