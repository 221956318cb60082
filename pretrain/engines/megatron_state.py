"""Canonical state of a Megatron-Core engine, both ways.

Three ways in which Megatron keeps FP32 weights and moments: the distributed optimizer holds a flat range of each
parameter (a data-parallel share of a tensor-parallel share); without it, bf16 parameters have a whole FP32 copy in
``parameter.main_param``, and FP32 parameters are optimized themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.engines.flat_state import GRADIENT, STEP, cut, flat_slots, forget_state, paste, start_state, step_count
from pretrain.optim.build import muon_parameters
from pretrain.optim.exchange import Share
from pretrain.optim.muon import MuonAdamW
from pretrain.parallel.canonical import CanonicalParameter, canonical_buffers, canonical_parameters
from pretrain.parallel.shard import Shard


@dataclass(frozen=True)
class LocalShare:
    """What this rank optimizes of one parameter: flat elements from ``start`` on, under the optimizer's ``key``."""

    start: int
    key: Tensor

    @property
    def master(self) -> Tensor:
        return self.key.detach().view(-1)


class MegatronState:
    """Export and import between Megatron-Core's optimizer and canonical fragments.

    Args:
        modules: this rank's chunks of our model.
        optimizer: what ``get_megatron_optimizer`` returned.
        dp_rank, tp_rank: a replicated tensor is exported by the ranks with both 0.

    ``optimizer`` is Megatron's own for all dense parameters.

    Raises:
        RuntimeError: the installed Megatron-Core keeps its state in a way this release does not know.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: Any, dp_rank: int, tp_rank: int) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        if len(parts) != 1:
            raise RuntimeError(f"expected one optimizer for dense parameters, found {len(parts)}")
        self._modules = modules
        self.optimizer = parts[0]
        self._torch: torch.optim.Optimizer = parts[0].optimizer
        if not isinstance(self._torch, torch.optim.AdamW):
            raise RuntimeError(f"expected torch's AdamW inside Megatron's optimizer, found {type(self._torch)}")
        self._is_sharded = hasattr(self.optimizer, "model_param_group_index_map")
        self._dp_rank = dp_rank
        self._tp_rank = tp_rank

    def export(self) -> Iterator[Fragment]:
        """Fragments of this rank; over all ranks they cover every logical tensor once."""
        if self._dp_rank == 0:
            for parameter in self._parameters():
                if not parameter.tensor.requires_grad and self._is_owner(parameter):
                    yield from cut(parameter, "weight", 0, parameter.tensor.data.reshape(-1))
        yield from self._export_shares(self._owned_shares())
        if self._dp_rank == 0 and self._tp_rank == 0:
            for module in self._modules:
                for name, buffer in canonical_buffers(module):
                    shape = tuple(buffer.shape)
                    yield Fragment(name, "buffer", shape, 0, buffer.reshape(-1), Shard.whole(shape))

    def gradients(self) -> Iterator[Fragment]:
        """This rank's share of the gradient, between Megatron's ``prepare_grads`` and the update."""
        for parameter, share in self._owned_shares():
            gradient = self._gradient(share.key)
            yield from cut(parameter, GRADIENT, share.start, gradient.detach().reshape(-1))

    def scalars(self) -> dict[str, float]:
        """The optimizer's step count, 0 before the first step."""
        return step_count(self._torch.state.values())

    @torch.no_grad()
    def load(self, reader: CheckpointReader, scalars: dict[str, float]) -> None:
        """Fill weights, masters and moments; see :meth:`pretrain.engines.base.Engine.import_state`."""
        for module in self._modules:
            load_weights(module, reader, partial=len(self._modules) > 1 or self._is_stage(module))
        self._load_shares(self.trained_shares(), reader, scalars[STEP])

    @torch.no_grad()
    def set_masters(self, values: Sequence[dict[str, Tensor]]) -> None:
        """Overwrite FP32 masters with full-precision values by module name, one mapping for each chunk."""
        for key, source in self.initial_masters(values).items():
            key.detach().view(-1).copy_(source)

    def initial_masters(self, values: Sequence[dict[str, Tensor]]) -> dict[Tensor, Tensor]:
        """Of full-precision values by module name, one mapping for each chunk: what belongs to each tensor that this
        rank optimizes, flat."""
        masters: dict[Tensor, Tensor] = {}
        for module, chunk_values in zip(self._modules, values, strict=True):
            for parameter in canonical_parameters(module):
                share = self._share(parameter) if parameter.module_name in chunk_values else None
                if share is not None:
                    source = chunk_values[parameter.module_name].view(-1)
                    masters[share.key] = source[share.start : share.start + share.key.numel()]
        return masters

    def attach_muon(self, group: Any, device: torch.device) -> None:
        """Tell Muon, if it is the optimizer, where its matrices lie. Collective over ``group``: the ranks that hold
        the same layers."""
        if not isinstance(self._torch, MuonAdamW):
            return
        shares = [
            Share(parameter, share.start, share.key.numel(), share.key, 0)
            for module in self._modules
            for parameter in muon_parameters(module)
            if (share := self._share(parameter)) is not None
        ]
        self._torch.attach(shares, group, device)

    def _export_shares(self, shares: Iterator[tuple[CanonicalParameter, LocalShare]]) -> Iterator[Fragment]:
        for parameter, share in shares:
            yield from cut(parameter, "master", share.start, share.master)
            for slot, values in flat_slots(self._torch, share.key):
                yield from cut(parameter, slot, share.start, values)

    def _load_shares(
        self, shares: Iterator[tuple[CanonicalParameter, LocalShare]], reader: CheckpointReader, step: float
    ) -> None:
        """Take over all slots of the shares as they are after ``step`` steps; weights are loaded already."""
        if step == 0:
            forget_state(self._torch)
        for parameter, share in shares:
            paste(parameter, share.start, share.master, reader, None)
            if step > 0:
                start_state(self._torch, share.key, step)
                for slot, values in flat_slots(self._torch, share.key):
                    paste(parameter, share.start, values, reader, slot)

    def _gradient(self, key: Tensor) -> Tensor:
        return torch.zeros_like(key) if key.grad is None else key.grad

    def trained_shares(self) -> Iterator[tuple[CanonicalParameter, LocalShare]]:
        """What this rank optimizes, by parameter."""
        for parameter in self._parameters():
            share = self._share(parameter) if parameter.tensor.requires_grad else None
            if share is not None:
                yield parameter, share

    def _owned_shares(self) -> Iterator[tuple[CanonicalParameter, LocalShare]]:
        """What this rank answers for of it."""
        if self._is_sharded or self._dp_rank == 0:
            for parameter, share in self.trained_shares():
                if self._is_owner(parameter):
                    yield parameter, share

    @staticmethod
    def _is_stage(module: nn.Module) -> bool:
        stage = getattr(module, "stage", None)
        return stage is not None and not (stage.has_embedding and stage.has_head)

    def _parameters(self) -> Iterator[CanonicalParameter]:
        for module in self._modules:
            yield from canonical_parameters(module)

    def _is_owner(self, parameter: CanonicalParameter) -> bool:
        """Whether this tensor-parallel rank and stage answers for what it holds of the parameter."""
        if getattr(parameter.tensor, "shared", False):
            return False  # the last stage's copy of a tied embedding
        return self._tp_rank == 0 or hasattr(parameter.tensor, "canonical_split")

    def _share(self, parameter: CanonicalParameter) -> LocalShare | None:
        tensor = parameter.tensor
        if self._is_sharded:
            place = self.optimizer.model_param_group_index_map.get(tensor)
            if place is None:
                return None
            group, order = place
            span = self.optimizer._get_model_param_range_map(tensor)["param"]
            return LocalShare(span.start, self._torch.param_groups[group]["params"][order])
        return LocalShare(0, getattr(tensor, "main_param", tensor))
