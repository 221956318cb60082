"""Canonical state of a DeepSpeed engine whose masters and moments are offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.engines.deepspeed_offload import ShardUpdate
from pretrain.engines.deepspeed_state import DeepSpeedState
from pretrain.engines.flat_state import STEP
from pretrain.engines.offload_state import MASTER, Held, export_states, import_states
from pretrain.parallel.canonical import CanonicalParameter, canonical_parameters


class OffloadedDeepSpeedState(DeepSpeedState):
    """Masters, moments and the step count are those of ``offload``; all the rest is DeepSpeed's."""

    def __init__(self, engine: Any, stage: int, dp_rank: int, dp_size: int, offload: ShardUpdate) -> None:
        super().__init__(engine, stage, dp_rank, dp_size)
        self._offload = offload

    def scalars(self) -> dict[str, float]:
        return {STEP: float(self._offload.step)}

    def master(self, module_name: str) -> tuple[int, Tensor] | None:
        """See :meth:`DeepSpeedState.master`; values are a copy on the host."""
        held = self._held(self._by_name[module_name])
        return None if held is None else (held.start, self._offload.states.read(held.target, MASTER, alone=True))

    def _export_trained(self) -> Iterator[Fragment]:
        yield from export_states(self._offload.states, self._all_held(), self._offload.step)

    @torch.no_grad()
    def _load_trained(self, reader: CheckpointReader, step: float) -> None:
        import_states(self._offload.states, self._all_held(), reader, step)
        self._offload.step = int(step)

    def _all_held(self) -> Iterator[Held]:
        for parameter in canonical_parameters(self._module):
            if (held := self._held(parameter)) is not None:
                yield held

    def _held(self, parameter: CanonicalParameter) -> Held | None:
        target = self._offload.target(parameter.tensor)
        return None if target is None else Held(parameter, self._offload.pieces[target].start, target)
