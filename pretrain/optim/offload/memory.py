"""Memory of offloaded state: how a subgroup's state lies in it, and all buffers that a plan needs.

A subgroup's state is one block of bytes, so that it moves in one copy: first moments, second moments (FP32), then the
master in its storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from pretrain.optim.offload.device import Device
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.subgroups import Subgroup


class Storage(StrEnum):
    """What is stored of a subgroup's masters: all 32 bits, the low 16 bits beside a BF16 weight, or nothing, because
    the FP32 weight is the master."""

    FULL = "full"
    LOW_BITS = "low bits"
    WEIGHT = "weight"

    @property
    def width(self) -> int:
        """Bytes of state per element."""
        return {Storage.FULL: 12, Storage.LOW_BITS: 10, Storage.WEIGHT: 8}[self]


@dataclass(frozen=True)
class State:
    """Flat views of one subgroup's state; ``master`` is FP32, int16 or None by storage."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None

    @classmethod
    def of(cls, block: Tensor, numel: int, storage: Storage) -> State:
        """Views of ``numel`` elements at the beginning of ``block`` (uint8)."""
        dtype = {Storage.FULL: torch.float32, Storage.LOW_BITS: torch.int16, Storage.WEIGHT: None}[storage]
        return cls(
            block[: 4 * numel].view(torch.float32),
            block[4 * numel : 8 * numel].view(torch.float32),
            None if dtype is None else block[8 * numel : storage.width * numel].view(dtype),
        )

    def part(self, start: int, stop: int) -> State:
        master = None if self.master is None else self.master[start:stop]
        return State(self.exp_avg[start:stop], self.exp_avg_sq[start:stop], master)


@dataclass(frozen=True)
class Shape:
    """What the sizes of all buffers follow from. ``storages``: by subgroup; ``weight_width``: bytes of a weight."""

    subgroups: tuple[Subgroup, ...]
    storages: tuple[Storage, ...]
    weight_width: tuple[int, ...]
    gradient_dtype: torch.dtype

    def state_bytes(self, subgroup: int) -> int:
        return self.subgroups[subgroup].numel * self.storages[subgroup].width

    def slot_bytes(self, plan: Plan) -> dict[int, int]:
        """Bytes by slot: the largest state that it is ever given."""
        sizes: dict[int, int] = {}
        for turn, subgroup in enumerate(plan.streamed):
            slot = plan.slot(turn)
            sizes[slot] = max(sizes.get(slot, 0), self.state_bytes(subgroup))
        return sizes

    def gradient_bytes(self, plan: Plan) -> dict[int, int]:
        """Bytes by host buffer of gradients."""
        sizes: dict[int, int] = {}
        for turn, subgroup in enumerate(plan.cpu_order):
            buffer = turn if plan.early_gradients else turn % plan.num_host_buffers
            sizes[buffer] = max(sizes.get(buffer, 0), self.subgroups[subgroup].numel * self.gradient_dtype.itemsize)
        return sizes

    def staged_bytes(self, plan: Plan) -> dict[int, int]:
        """Bytes by host buffer of weights."""
        sizes: dict[int, int] = {}
        for turn, subgroup in enumerate(plan.cpu_order):
            buffer = turn % plan.num_host_buffers
            sizes[buffer] = max(sizes.get(buffer, 0), self.subgroups[subgroup].numel * self.weight_width[subgroup])
        return sizes

    def host_bytes(self, plan: Plan, *, host_weights: bool) -> dict[str, int]:
        """Bytes of host memory by what they hold; computed before anything is allocated."""
        parts = dict.fromkeys(("moments", "master weights", "gradients", "updated weights", "buffers"), 0)
        for subgroup, place in enumerate(plan.places):
            if place is not Place.RESIDENT or host_weights:
                numel = self.subgroups[subgroup].numel
                parts["moments"] += 8 * numel
                parts["master weights"] += (self.storages[subgroup].width - 8) * numel
        if host_weights:
            parts["buffers"] = sum(self.slot_bytes(plan).values())
        else:
            parts["gradients"] = sum(self.gradient_bytes(plan).values())
            parts["updated weights"] = sum(self.staged_bytes(plan).values())
        return parts

    def device_bytes(self, plan: Plan) -> dict[str, int]:
        """Bytes of device memory by what they hold; early buffers only from the last backward to the next forward."""
        slots = self.slot_bytes(plan)
        return {
            "resident state": sum(
                self.state_bytes(i) for i, place in enumerate(plan.places) if place is Place.RESIDENT
            ),
            "buffers": sum(size for slot, size in slots.items() if slot < plan.num_slots),
            "early buffers": sum(size for slot, size in slots.items() if slot >= plan.num_slots),
        }


class Memory:
    """The blocks that a plan needs, from ``device``. Homes of state outlive plans, buffers do not."""

    def __init__(self, device: Device, shape: Shape, plan: Plan) -> None:
        self._device = device
        self.shape = shape
        self._homes: dict[int, Tensor] = {}
        self._slots: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._staged: dict[int, Tensor] = {}
        for subgroup in shape.subgroups:
            home = self._empty_home(subgroup.index, plan.places[subgroup.index])
            home.zero_()
            self._homes[subgroup.index] = home
        self._set_buffers(plan)

    def home(self, subgroup: int) -> Tensor:
        """The block where a subgroup's state lives, on the host or (resident) on the device."""
        return self._homes[subgroup]

    def home_state(self, subgroup: int) -> State:
        return self.state(self._homes[subgroup], subgroup)

    def state(self, block: Tensor, subgroup: int) -> State:
        return State.of(block, self.shape.subgroups[subgroup].numel, self.shape.storages[subgroup])

    def slot(self, number: int) -> Tensor:
        return self._slots[number]

    def missing_bytes(self, number: int) -> int:
        """Device memory that a slot beyond the ring still has to be given, 0 where it is there."""
        return 0 if number in self._slots else self._early[number]

    def add_early_slot(self, number: int) -> None:
        """Device memory for early state beyond the ring of slots."""
        self._slots[number] = self._device.empty_device(self._early[number])

    @property
    def early_bytes(self) -> int:
        """Device memory that slots beyond the ring have now."""
        return sum(size for number, size in self._early.items() if number in self._slots)

    def take_early_slot(self, number: int) -> Tensor | None:
        """Give up a slot that :meth:`add_early_slot` made, None for one that stays."""
        return self._slots.pop(number) if number in self._early else None

    def host_gradient(self, buffer: int, numel: int) -> Tensor:
        dtype = self.shape.gradient_dtype
        return self._gradients[buffer][: numel * dtype.itemsize].view(dtype)

    def staged(self, buffer: int, numel: int, dtype: torch.dtype) -> Tensor:
        return self._staged[buffer][: numel * dtype.itemsize].view(dtype)

    def replan(self, old: Plan, new: Plan) -> None:
        """Move homes and make buffers anew; nothing may be under way."""
        for subgroup in range(len(self.shape.subgroups)):
            if (old.places[subgroup] is Place.RESIDENT) != (new.places[subgroup] is Place.RESIDENT):
                home = self._empty_home(subgroup, new.places[subgroup])
                home.copy_(self._homes[subgroup])
                self._homes[subgroup] = home
        # First gone, then made: both need not fit at once.
        self._slots, self._gradients, self._staged = {}, {}, {}
        self._set_buffers(new)

    def _empty_home(self, subgroup: int, place: Place) -> Tensor:
        size = self.shape.state_bytes(subgroup)
        return self._device.empty_device(size) if place is Place.RESIDENT else self._device.empty_host(size)

    def _set_buffers(self, plan: Plan) -> None:
        slots = self.shape.slot_bytes(plan)
        self._early = {number: size for number, size in slots.items() if number >= plan.num_slots}
        self._slots = {n: self._device.empty_device(size) for n, size in slots.items() if n < plan.num_slots}
        if not self._device.host_weights:
            gradients, staged = self.shape.gradient_bytes(plan), self.shape.staged_bytes(plan)
            self._gradients = {number: self._device.empty_host(size) for number, size in gradients.items()}
            self._staged = {number: self._device.empty_host(size) for number, size in staged.items()}


def check_plan(plan: Plan, subgroups: Sequence[Subgroup]) -> None:
    """Every subgroup is updated once, at its place.

    Raises:
        ValueError: it is not so.
    """
    done = sorted((*plan.device_order, *plan.cpu_order))
    if len(plan.places) != len(subgroups) or done != list(range(len(subgroups))):
        raise ValueError(
            f"a plan for {len(plan.places)} subgroups updates {done}, expected each of {len(subgroups)} once"
        )
    wrong = [i for i in plan.device_order if plan.places[i] is Place.CPU]
    wrong += [i for i in plan.cpu_order if plan.places[i] is not Place.CPU]
    if wrong:
        raise ValueError(f"a plan updates subgroups {wrong} elsewhere than at their places")
    if plan.streamed and plan.num_slots < 1:
        raise ValueError(
            f"a plan streams {len(plan.streamed)} subgroups through {plan.num_slots} slots, expected 1 or more"
        )
    if not 0 <= plan.num_early <= len(plan.streamed):
        raise ValueError(f"a plan prefetches {plan.num_early} of {len(plan.streamed)} streamed subgroups early")
    if plan.cpu_order and plan.num_host_buffers < 1:
        raise ValueError("a plan updates subgroups on the CPU without a host buffer")
