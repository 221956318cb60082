"""Canonical state of a Megatron-Core engine whose optimizer state is offloaded, both ways."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.engines.flat_state import STEP
from pretrain.engines.megatron_offload import OffloadedShards
from pretrain.engines.megatron_offload_contract import GRADIENT_OF_SHARD
from pretrain.engines.megatron_state import LocalShare, MegatronState
from pretrain.engines.offload_state import Held, export_states, import_states
from pretrain.parallel.canonical import CanonicalParameter


class OffloadedMegatronState(MegatronState):
    """As :class:`MegatronState`, with masters and moments of :class:`OffloadedShards`."""

    _torch: OffloadedShards

    def scalars(self) -> dict[str, float]:
        return {STEP: float(self._torch.num_steps)}

    def _export_shares(self, shares: Iterator[tuple[CanonicalParameter, LocalShare]]) -> Iterator[Fragment]:
        return export_states(self._torch.states, self._held(shares), self._torch.num_steps)

    def _load_shares(
        self, shares: Iterator[tuple[CanonicalParameter, LocalShare]], reader: CheckpointReader, step: float
    ) -> None:
        import_states(self._torch.states, self._held(shares), reader, step)
        self._torch.num_steps = int(step)

    def _gradient(self, key: Tensor) -> Tensor:
        gradient = getattr(key, GRADIENT_OF_SHARD, None)
        return torch.zeros_like(key, dtype=torch.float32) if gradient is None else gradient

    def _held(self, shares: Iterator[tuple[CanonicalParameter, LocalShare]]) -> Iterator[Held]:
        for parameter, share in shares:
            yield Held(parameter, share.start, self._torch.targets[share.key])
