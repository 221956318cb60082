"""Memory of offloaded state: how a subgroup's state lies in it, and all buffers that a plan needs.

A subgroup's state is one block of bytes, so that it moves in one copy: first moments, second moments (FP32), then the
master in its storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from pretrain.optim.offload import sizes
from pretrain.optim.offload.constants import Widths
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

    @cached_property
    def widths(self) -> tuple[Widths, ...]:
        """By subgroup."""
        gradient = self.gradient_dtype.itemsize
        return tuple(Widths(s.width, gradient, w) for s, w in zip(self.storages, self.weight_width, strict=True))

    def host_bytes(self, plan: Plan, *, host_weights: bool) -> dict[str, int]:
        """Bytes of host memory by what they hold; computed before anything is allocated."""
        return sizes.host_parts(plan, self.subgroups, self.widths, host_weights=host_weights)

    def leaving_bytes(self, old: Plan, new: Plan) -> int:
        """Bytes of host memory that ``new`` no longer takes, but that are there until all else was moved."""
        pairs = enumerate(zip(old.places, new.places, strict=True))
        return sum(self.state_bytes(i) for i, (a, b) in pairs if a is not Place.RESIDENT and b is Place.RESIDENT)

    def device_bytes(self, plan: Plan) -> dict[str, int]:
        """Bytes of device memory by what they hold; early buffers only from the last backward to the next forward."""
        return sizes.device_parts(plan, self.subgroups, self.widths)


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
        self._missing: Plan | None = None
        """Whose buffers are gone and could not be made again."""

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

    def forget_early_slots(self) -> None:
        """There will be no more of them; those that are there were taken by :meth:`take_early_slot`."""
        self._early.clear()

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
        """Move homes and make buffers anew; nothing may be under way.

        Raises:
            torch.OutOfMemoryError: there is no memory for it. All is as before, except that buffers may be left to
                :meth:`complete`.
        """
        # First gone, then made: both need not fit at once. Homes stay until nothing can fail any more.
        self._drop_buffers()
        homes = {}
        try:
            for subgroup in range(len(self.shape.subgroups)):
                if (old.places[subgroup] is Place.RESIDENT) != (new.places[subgroup] is Place.RESIDENT):
                    homes[subgroup] = self._empty_home(subgroup, new.places[subgroup])
                    homes[subgroup].copy_(self._homes[subgroup])
            self._set_buffers(new)
        except BaseException:
            homes.clear()
            self._drop_buffers()
            self._missing = old
            with suppress(torch.OutOfMemoryError):
                self.complete()
            raise
        self._homes |= homes
        self._missing = None

    @property
    def is_complete(self) -> bool:
        return self._missing is None

    def complete(self) -> None:
        """Make buffers that are missing since :meth:`replan` failed.

        Raises:
            torch.OutOfMemoryError: there is no memory for them; they are missing still.
        """
        if self._missing is not None:
            try:
                self._set_buffers(self._missing)
            except BaseException:
                self._drop_buffers()
                raise
            self._missing = None

    def _drop_buffers(self) -> None:
        self._slots, self._gradients, self._staged = {}, {}, {}

    def _empty_home(self, subgroup: int, place: Place) -> Tensor:
        size = self.shape.state_bytes(subgroup)
        return self._device.empty_device(size) if place is Place.RESIDENT else self._device.empty_host(size)

    def _set_buffers(self, plan: Plan) -> None:
        given = plan, self.shape.subgroups, self.shape.widths
        slots = sizes.slot_bytes(*given)
        self._early = {number: size for number, size in slots.items() if number >= plan.num_slots}
        self._slots = {n: self._device.empty_device(size) for n, size in slots.items() if n < plan.num_slots}
        if not self._device.host_weights:
            gradients, staged = sizes.gradient_bytes(*given), sizes.staged_bytes(*given)
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
