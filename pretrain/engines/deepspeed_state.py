"""Canonical state of a DeepSpeed engine, ZeRO stages 0 to 2, both ways.

Stages 1 and 2 flatten each parameter group, cut it into one partition per data-parallel rank and keep FP32 masters and
moments of the own partition only. DeepSpeed describes what a rank holds of a parameter in ``parameter._hp_mapping``:
where the fragment lies in the parameter and where in the flat partition. Stage 0 leaves torch's optimizer as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader, load_weights, weight_slot
from pretrain.parallel.canonical import CanonicalParameter, canonical_buffers, canonical_parameters

STEP = "step"


@dataclass(frozen=True)
class LocalShare:
    """What this rank owns of one trained parameter: flat elements ``[start, start + master.numel())``.

    ``state_key`` is the tensor under which the optimizer keeps its state; the share lies at ``offset`` inside it.
    """

    start: int
    master: Tensor
    state_key: Tensor
    offset: int


class DeepSpeedState:
    """Export and import between a DeepSpeed engine and canonical fragments.

    Raises:
        RuntimeError: the installed DeepSpeed keeps its partitions in a way this release does not know.
    """

    def __init__(self, engine: Any, stage: int, dp_rank: int) -> None:
        self._module: nn.Module = engine.module
        self._stage = stage
        self._dp_rank = dp_rank
        self._zero = engine.optimizer
        # ZeRO's optimizer wraps torch's; stage 0 in FP32 hands over torch's itself.
        self._optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if stage else engine.optimizer
        self._partitions = self._flat_partitions() if stage else []

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's FP32 partition of each parameter group; the second name is the bf16 stage-1 optimizer's."""
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, name):
                return list(getattr(self._zero, name))
        raise RuntimeError(
            f"{type(self._zero).__name__} of this DeepSpeed keeps its FP32 partitions under an unknown name; "
            "install the version in constraints.txt"
        )

    def export(self) -> Iterator[Fragment]:
        """Fragments of this rank: masters, every flat optimizer slot, frozen weights, buffers."""
        for parameter in canonical_parameters(self._module):
            if not parameter.tensor.requires_grad:
                if self._dp_rank == 0:
                    flat = parameter.tensor.data.reshape(-1)
                    for part in parameter.parts:
                        yield Fragment(part.name, "weight", part.shape, 0, flat[part.start : part.stop])
                continue
            share = self._share(parameter)
            if share is None or (self._stage == 0 and self._dp_rank != 0):
                continue
            yield from _cut(parameter, "master", share.start, share.master)
            for slot, values in self._flat_slots(share):
                yield from _cut(parameter, slot, share.start, values)
        if self._dp_rank == 0:
            for name, buffer in canonical_buffers(self._module):
                yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.reshape(-1))

    def scalars(self) -> dict[str, float]:
        """Adam's step count, 0 before the first step."""
        for state in self._optimizer.state.values():
            if STEP in state:
                return {STEP: float(state[STEP])}
        return {STEP: 0.0}

    @torch.no_grad()
    def load(self, reader: CheckpointReader, scalars: dict[str, float]) -> None:
        """Fill weights, masters and optimizer slots from ``reader``; see :meth:`Engine.import_state`."""
        load_weights(self._module, reader)
        with_moments = scalars[STEP] > 0
        for parameter in canonical_parameters(self._module):
            share = self._share(parameter) if parameter.tensor.requires_grad else None
            if share is None:
                continue
            # At stage 0 the master is the weight itself, which is loaded by now.
            if self._stage:
                _paste(parameter, share, share.master, reader, None)
            if with_moments:
                state = self._optimizer.state[share.state_key]
                state[STEP] = torch.tensor(scalars[STEP], dtype=torch.float32)
                for slot in ("exp_avg", "exp_avg_sq"):
                    if slot not in state:
                        state[slot] = torch.zeros_like(share.state_key, memory_format=torch.preserve_format)
                    flat = state[slot].view(-1)[share.offset : share.offset + share.master.numel()]
                    _paste(parameter, share, flat, reader, slot)

    @torch.no_grad()
    def set_masters(self, values: dict[str, Tensor]) -> None:
        """Overwrite FP32 masters with full-precision values by module name (DeepSpeed starts them from bf16)."""
        assert self._stage, "stage 0 keeps no separate masters"
        for parameter in canonical_parameters(self._module):
            share = self._share(parameter) if parameter.module_name in values else None
            if share is not None:
                source = values[parameter.module_name].view(-1)
                share.master.copy_(source[share.start : share.start + share.master.numel()])

    def _share(self, parameter: CanonicalParameter) -> LocalShare | None:
        tensor = parameter.tensor
        if self._stage == 0:
            return LocalShare(0, tensor.data.view(-1), tensor, 0)
        mapping = getattr(tensor, "_hp_mapping", None)
        if mapping is None:
            return None
        partition = self._partitions[mapping.param_group_index]
        address = mapping.hp_fragment_address
        master = partition.data.narrow(0, address.start, address.numel)
        return LocalShare(mapping.lp_fragment_address.start, master, partition, address.start)

    def _flat_slots(self, share: LocalShare) -> Iterator[tuple[str, Tensor]]:
        state = self._optimizer.state.get(share.state_key, {})
        for slot, value in state.items():
            if torch.is_tensor(value) and value.shape == share.state_key.shape:
                yield slot, value.view(-1)[share.offset : share.offset + share.master.numel()]


def _cut(parameter: CanonicalParameter, slot: str, start: int, values: Tensor) -> Iterator[Fragment]:
    """Split a flat range of a parameter at the borders of its logical parts."""
    stop = start + values.numel()
    for part in parameter.parts:
        low, high = max(start, part.start), min(stop, part.stop)
        if low < high:
            yield Fragment(part.name, slot, part.shape, low - part.start, values[low - start : high - start])


def _paste(
    parameter: CanonicalParameter,
    share: LocalShare,
    target: Tensor,
    reader: CheckpointReader,
    slot: str | None,
) -> None:
    """Fill ``target``, this rank's flat range of a parameter, from the stored parts (slot None: the weight)."""
    start, stop = share.start, share.start + target.numel()
    for part in parameter.parts:
        low, high = max(start, part.start), min(stop, part.stop)
        if low < high:
            source = slot or weight_slot(reader, part.name)
            target[low - start : high - start].copy_(
                reader.read(part.name, source, low - part.start, high - part.start)
            )
