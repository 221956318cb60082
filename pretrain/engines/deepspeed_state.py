"""Canonical state of a DeepSpeed engine, ZeRO stages 0 to 3, both ways.

Every rank exports and imports what it owns, as flat ranges of logical tensors; nothing is gathered at any stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, check_model, load_weights
from pretrain.engines.deepspeed_partitions import LocalShare, ShardedParameters, partitions
from pretrain.engines.flat_state import GRADIENT, STEP, cut, flat_slots, forget_state, paste, start_state, step_count
from pretrain.optim.build import muon_parameters
from pretrain.optim.exchange import Share
from pretrain.optim.muon import MuonAdamW
from pretrain.parallel.canonical import CanonicalParameter, canonical_buffers, canonical_parameters
from pretrain.parallel.shard import Shard


class DeepSpeedState:
    """Export and import between a DeepSpeed engine and canonical fragments.

    Raises:
        RuntimeError: the installed DeepSpeed keeps its partitions in a way this release does not know.
    """

    def __init__(self, engine: Any, stage: int, dp_rank: int, dp_size: int) -> None:
        self._module: nn.Module = engine.module
        self._stage = stage
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._partitions = partitions(engine.optimizer, stage, dp_rank)
        self._by_name = {p.module_name: p for p in canonical_parameters(self._module)}

    def export(self) -> Iterator[Fragment]:
        """Fragments of this rank: masters, every flat optimizer slot, frozen weights, buffers."""
        for parameter in canonical_parameters(self._module):
            if not parameter.tensor.requires_grad:
                yield from cut(parameter, "weight", *self._frozen(parameter))
        yield from self._export_trained()
        if self._dp_rank == 0:
            for name, buffer in canonical_buffers(self._module):
                shape = tuple(buffer.shape)
                yield Fragment(name, "buffer", shape, 0, buffer.reshape(-1), Shard.whole(shape))

    def gradients(self) -> Iterator[Fragment]:
        """This rank's share of the gradient, between the last backward pass of a step and its update."""
        read = self._partitions.gradients()
        for parameter in canonical_parameters(self._module):
            share = self._partitions.share(parameter) if parameter.tensor.requires_grad else None
            if share is not None:
                values = read(parameter, share)
                place = self._dealt(values) if self._stage == 0 else (share.start, values)
                yield from cut(parameter, GRADIENT, *place)

    def scalars(self) -> dict[str, float]:
        """The optimizer's step count, 0 before the first step."""
        return step_count(self._partitions.optimizer.state.values())

    @torch.no_grad()
    def load(self, reader: CheckpointReader, scalars: dict[str, float]) -> None:
        """Fill weights, masters and optimizer slots from ``reader``; see :meth:`Engine.import_state`."""
        parts = self._partitions
        if isinstance(parts, ShardedParameters):
            check_model(self._module, reader)
            parts.release_gathered()
            for name, buffer in canonical_buffers(self._module):
                if reader.has(name, "buffer"):
                    buffer.copy_(reader.tensor(name, "buffer"))
            for parameter in canonical_parameters(self._module):
                if not parameter.tensor.requires_grad:
                    start, piece = parts.weight(parameter)
                    paste(parameter, start, piece, reader, None)
        else:
            load_weights(self._module, reader)
        self._load_trained(reader, scalars[STEP])

    @torch.no_grad()
    def set_masters(self, values: dict[str, Tensor]) -> None:
        """Overwrite FP32 masters with full-precision values by module name (DeepSpeed starts them from bf16)."""
        assert self._stage, "stage 0 keeps no separate masters"
        for parameter in canonical_parameters(self._module):
            share = self._partitions.share(parameter) if parameter.module_name in values else None
            if share is not None:
                source = values[parameter.module_name].reshape(-1)
                share.master.copy_(source[share.start : share.start + share.master.numel()])

    def master(self, module_name: str) -> tuple[int, Tensor] | None:
        """First flat element and values of what this rank holds of a trained parameter's master, None for nothing."""
        share = self._partitions.share(self._by_name[module_name])
        return None if share is None else (share.start, share.master)

    def attach_muon(self, device: torch.device) -> None:
        """Tell Muon, if it is the optimizer, where its matrices lie. Collective."""
        optimizer = self._partitions.optimizer
        if not isinstance(optimizer, MuonAdamW):
            return
        shares = [
            Share(parameter, share.start, share.master.numel(), share.state_key, share.offset)
            for parameter in muon_parameters(self._module)
            if (share := self._partitions.share(parameter)) is not None
        ]
        # From stage 1 on DeepSpeed may step one flat tensor after the other.
        turns = list(self._partitions.state_keys()) if self._stage else None
        optimizer.attach(shares, torch.distributed.group.WORLD, device, turns)

    def _export_trained(self) -> Iterator[Fragment]:
        """Masters and optimizer slots of this rank."""
        for parameter in canonical_parameters(self._module):
            share = self._partitions.share(parameter) if parameter.tensor.requires_grad else None
            if share is None:
                continue
            for slot, values in (("master", share.master), *self._flat_slots(share)):
                yield from cut(parameter, slot, *(self._dealt(values) if self._stage == 0 else (share.start, values)))

    def _load_trained(self, reader: CheckpointReader, step: float) -> None:
        """Take over masters and optimizer slots after ``step`` steps; whole weights are loaded by now."""
        parts = self._partitions
        if step > 0:
            # Padding included, of which a rank may have nothing else.
            for key in parts.state_keys():
                start_state(parts.optimizer, key, step)
        else:
            forget_state(parts.optimizer)
        for parameter in canonical_parameters(self._module):
            share = parts.share(parameter) if parameter.tensor.requires_grad else None
            if share is None:
                continue
            # At stage 0 the master is the weight itself.
            if self._stage:
                paste(parameter, share.start, share.master, reader, None)
            if step > 0:
                for slot, values in self._flat_slots(share):
                    paste(parameter, share.start, values, reader, slot)
        if isinstance(parts, ShardedParameters):
            parts.weights_from_masters()

    def _frozen(self, parameter: CanonicalParameter) -> tuple[int, Tensor]:
        """First flat element and values that this rank answers for of a parameter that is not trained."""
        if isinstance(self._partitions, ShardedParameters):
            return self._partitions.weight(parameter)
        return self._dealt(parameter.tensor.data.reshape(-1))

    def _dealt(self, replica: Tensor) -> tuple[int, Tensor]:
        """This rank's equal part of what every rank holds: first element and values."""
        start, stop = (len(replica) * rank // self._dp_size for rank in (self._dp_rank, self._dp_rank + 1))
        return start, replica[start:stop]

    def _flat_slots(self, share: LocalShare) -> Iterator[tuple[str, Tensor]]:
        for slot, values in flat_slots(self._partitions.optimizer, share.state_key):
            yield slot, values[share.offset : share.offset + share.master.numel()]
