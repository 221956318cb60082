"""Offloaded AdamW state of flat weights: the core that every adapter drives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.arithmetic import GRADIENT_DTYPES, StepScalars, join_master, round_to_bf16, split_master
from pretrain.optim.offload.choose import choose_device, choose_plan, require_on_every_rank
from pretrain.optim.offload.device import Device
from pretrain.optim.offload.executor import Executor
from pretrain.optim.offload.host_memory import require_host_memory
from pretrain.optim.offload.memory import Memory, Shape, State, Storage, check_plan
from pretrain.optim.offload.schedule import Plan
from pretrain.optim.offload.subgroups import Segment, Target, cut_subgroups

SLOTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class GroupSettings:
    """AdamW's settings of one parameter group in one step."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> GroupSettings:
        """Those of a parameter group of a torch optimizer."""
        return cls(float(group["lr"]), tuple(group["betas"]), float(group["eps"]), float(group["weight_decay"]))


class Watcher(Protocol):
    """Sees steps as they go: measures, and may ask for another plan."""

    def before_early(self) -> None: ...

    def before_update(self) -> None: ...

    def after_update(self, states: OffloadedStates) -> None: ...


class OffloadedStates:
    """FP32 masters and moments of ``weights`` in subgroups, each updated where the plan says.

    Args:
        weights: flat contiguous views of the weights on the model's device (FP32, BF16 or FP16), written in place.
        groups: parameter group of each.
        config: ``optimizer.offload``.
        gradient_dtype: of gradients' buffers on the host.
        masters: initial FP32 values by weight (None: the weights).
        apart: small weights whose masters are read after every step (None: none). Their state is in subgroups of its
            own and stays on the device under any plan, so that reading waits for no state on its way home.
        device, plan: otherwise chosen for where the weights are.

    Raises:
        ValueError: weights that cannot be updated; host memory does not suffice, which is known before any is taken.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        groups: Sequence[int],
        config: OffloadConfig,
        *,
        gradient_dtype: torch.dtype,
        masters: Sequence[Tensor] | None = None,
        apart: Sequence[bool] | None = None,
        device: Device | None = None,
        plan: Plan | None = None,
    ) -> None:
        self._weights = [weight.detach() for weight in weights]
        _check_weights(self._weights, groups)
        # Subgroups are alike throughout: of one parameter group and one kind of weight.
        is_apart = apart or [False] * len(self._weights)
        keys = [(g, w.dtype, a) for g, w, a in zip(groups, self._weights, is_apart, strict=True)]
        kinds = sorted(set(keys), key=lambda key: (key[0], str(key[1]), key[2]))
        targets = [Target(w.numel(), kinds.index(key)) for w, key in zip(self._weights, keys, strict=True)]
        self.subgroups = cut_subgroups(targets, config.subgroup_size)
        self._groups = tuple(kinds[subgroup.group][0] for subgroup in self.subgroups)
        self._apart = frozenset(subgroup.index for subgroup in self.subgroups if kinds[subgroup.group][2])
        dtypes = [kinds[subgroup.group][1] for subgroup in self.subgroups]
        self._shape = Shape(
            self.subgroups,
            tuple(_storage(dtype, config.master) for dtype in dtypes),
            tuple(dtype.itemsize for dtype in dtypes),
            gradient_dtype,
        )
        self._segments: list[list[tuple[int, Segment]]] = [[] for _ in self._weights]
        for subgroup in self.subgroups:
            for segment in subgroup.segments:
                self._segments[segment.target].append((subgroup.index, segment))
        self.config = config
        self.device = device or choose_device(self._weights, config)
        failure: Exception | None = None
        needed: dict[str, int] = {}
        try:
            self.plan = self.adapted(plan or choose_plan(self._shape, config, self.device))
            check_plan(self.plan, self.subgroups)
            needed = self._shape.host_bytes(self.plan, host_weights=self.device.host_weights)
        except Exception as error:  # other ranks must not wait for this one
            failure = error
        require_on_every_rank(needed, config.host_memory_gib, pinned=not self.device.host_weights, failure=failure)
        self._memory = Memory(self.device, self._shape, self.plan)
        self._executor = Executor(self.device, self._memory, self.plan, self._weights)
        self._waiting: dict[int, Tensor] = {}
        self._torn: BaseException | None = None
        self.watcher: Watcher | None = None
        for number, weight in enumerate(self._weights):
            self.write(number, "master", weight if masters is None else masters[number].reshape(-1))

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def host_bytes(self) -> int:
        """Host memory that the present plan takes."""
        return sum(self._shape.host_bytes(self.plan, host_weights=self.device.host_weights).values())

    def adapted(self, plan: Plan) -> Plan:
        """What becomes of a plan here: state that is read after every step stays on the device."""
        return plan.with_resident(self._apart)

    @property
    def early_bytes(self) -> int:
        """Device memory that state brought early takes at the moment, beyond :attr:`device_bytes`'s lasting parts."""
        return self._memory.early_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory that the present plan takes at most (on the host, where there is no device)."""
        return sum(self._shape.device_bytes(self.plan).values())

    def start_early(self) -> None:
        """Bring state to the device; call it in the last backward pass of a step, or before it."""
        self._check_whole()
        if self.watcher is not None:
            self.watcher.before_early()
        self._executor.start_early()

    def advance_early(self) -> None:
        """Bring more state after :meth:`start_early`, into memory that the backward pass set free since; call it now
        and then."""
        self._executor.advance_early()

    def gradient_ready(self, target: int, gradient: Tensor) -> None:
        """Tell that the flat gradient of a target is final; it must stay as it is until the update.

        What the CPU updates goes to the host once all targets of a subgroup were told.
        """
        self._check_whole()
        self._waiting[target] = gradient
        for number, _ in self._segments[target]:
            needed = {segment.target for segment in self.subgroups[number].segments}
            if self._executor.sends_early(number) and needed <= self._waiting.keys():
                given = [self._waiting.get(t) for t in range(len(self._weights))]
                self._executor.send_gradient(number, given)

    def update(
        self,
        gradients: Sequence[Tensor | None],
        settings: Sequence[GroupSettings],
        step: int,
        grad_scale: float = 1.0,
    ) -> None:
        """One step of AdamW over all weights.

        Args:
            gradients: flat, by target, on the weights' device; None leaves a target's weights and moments alone.
            settings: by parameter group.
            step: from 1.
            grad_scale: factor on all gradients (clip factor / loss scale).

        Raises:
            ValueError: a gradient does not fit its weight.
            RuntimeError: an earlier update failed half-way.
            torch.OutOfMemoryError: buffers that a failed :meth:`replan` took cannot be had again. Nothing was changed:
                call again, or :meth:`discard`.
        """
        self._check_whole()
        self._check_gradients(gradients)
        by_group = [
            StepScalars.of(
                step=step,
                learning_rate=s.learning_rate,
                betas=s.betas,
                eps=s.eps,
                weight_decay=s.weight_decay,
                grad_scale=grad_scale,
            )
            for s in settings
        ]
        self._memory.complete()
        self._waiting = {}
        if self.watcher is not None:
            self.watcher.before_update()
        try:
            self._executor.update(gradients, [by_group[group] for group in self._groups])
            # Of a plan with less early state, where there was no memory for it.
            self.plan = self._executor.plan
            if not self.config.overlap:
                self._executor.synchronize()
        except BaseException as error:
            self._torn = error
            raise
        if self.watcher is not None:
            self.watcher.after_update(self)

    def discard(self) -> None:
        """The step is dropped: weights and state stay as they are."""
        self._waiting = {}
        self._executor.discard()

    def synchronize(self, subgroups: Collection[int] | None = None) -> None:
        """Wait until state is at home and weights are written, of all subgroups or of these.

        Raises:
            RuntimeError: an update failed half-way.
        """
        self._check_whole()
        try:
            if subgroups is None:
                self._executor.synchronize()
            else:
                self._executor.finish(subgroups)
        except BaseException as error:
            self._torn = error
            raise

    @torch.no_grad()
    def read(self, target: int, slot: str, start: int = 0, stop: int | None = None, *, alone: bool = False) -> Tensor:
        """FP32 values ``[start, stop)`` of a target's ``master``, ``exp_avg`` or ``exp_avg_sq``, a copy on the host.

        ``alone``: wait for this target's state and for no other's. Not for saving: whether the update succeeds as a
        whole is not known by then.

        Raises:
            RuntimeError: an update failed half-way: what is there must not be saved.
        """
        self.synchronize({number for number, _ in self._segments[target]} if alone else None)
        stop = self._weights[target].numel() if stop is None else stop
        values = torch.empty(stop - start, dtype=torch.float32)
        for state, storage, weight, low, high in self._parts(target, start, stop):
            values[low - start : high - start].copy_(_read(state, storage, weight, slot))
        return values

    @torch.no_grad()
    def write(self, target: int, slot: str, values: Tensor, start: int = 0) -> None:
        """Overwrite elements from ``start`` on; that of a ``master`` is rounded into the weight."""
        self.synchronize()
        for state, storage, weight, low, high in self._parts(target, start, start + values.numel()):
            part = values[low - start : high - start].detach().to(state.exp_avg.device, torch.float32)
            _write(state, storage, weight, slot, part)

    def reset(self) -> None:
        """Moments as before the first step."""
        for target, weight in enumerate(self._weights):
            for slot in ("exp_avg", "exp_avg_sq"):
                self.write(target, slot, torch.zeros(1).expand(weight.numel()))

    def replan(self, plan: Plan) -> None:
        """Go on by another plan; what it changes is time and place, never a value.

        Raises:
            ValueError: no plan for these subgroups, or host memory does not suffice.
            torch.OutOfMemoryError: device memory does not. The plan stays as it was, and everything at its place.
        """
        plan = self.adapted(plan)
        check_plan(plan, self.subgroups)
        self.synchronize()
        more = sum(self._shape.host_bytes(plan, host_weights=self.device.host_weights).values()) - self.host_bytes
        if not self.device.host_weights:
            more += self._shape.leaving_bytes(self.plan, plan)
        if more > 0:
            limit = self.config.host_memory_gib
            require_host_memory(
                {"more than now": more},
                limit_gib=None if limit is None else max(0.0, limit - self.host_bytes / 2**30),
                ranks_on_host=1,
                pinned=not self.device.host_weights,
            )
        self._executor.discard()
        self._memory.replan(self.plan, plan)
        self._executor.set_plan(plan)
        self.plan = plan

    def _parts(self, target: int, start: int, stop: int) -> Iterator[tuple[State, Storage, Tensor, int, int]]:
        for number, segment in self._segments[target]:
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                offset = segment.offset + low - segment.start
                state = self._memory.home_state(number).part(offset, offset + high - low)
                yield state, self._shape.storages[number], self._weights[target][low:high], low, high

    def _check_whole(self) -> None:
        if self._torn is not None:
            raise RuntimeError(
                "an update of the offloaded optimizer state failed half-way, so weights and state no longer belong "
                "together and nothing of them may be saved; resume from the last checkpoint"
            ) from self._torn

    def _check_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        if len(gradients) != len(self._weights):
            raise ValueError(f"{len(gradients)} gradients for {len(self._weights)} weights")
        for number, (gradient, weight) in enumerate(zip(gradients, self._weights, strict=True)):
            if gradient is not None and (gradient.shape != weight.shape or gradient.device != weight.device):
                raise ValueError(
                    f"gradient {number} is {tuple(gradient.shape)} on {gradient.device}, "
                    f"its weight {tuple(weight.shape)} on {weight.device}"
                )
            if gradient is not None and (gradient.dtype not in GRADIENT_DTYPES or not gradient.is_contiguous()):
                raise ValueError(
                    f"gradient {number} is {gradient.dtype} with strides {gradient.stride()}, expected contiguous "
                    "float32, bfloat16 or float16"
                )


def _storage(dtype: torch.dtype, master: str) -> Storage:
    if dtype == torch.float32:
        return Storage.WEIGHT
    return Storage.LOW_BITS if master == "low_bits" and dtype == torch.bfloat16 else Storage.FULL


def _read(state: State, storage: Storage, weight: Tensor, slot: str) -> Tensor:
    if slot == "exp_avg":
        return state.exp_avg
    if slot == "exp_avg_sq":
        # The sign bit is not its own with low bits; it is never negative.
        return state.exp_avg_sq.abs() if storage is Storage.LOW_BITS else state.exp_avg_sq
    if storage is Storage.WEIGHT:
        return weight
    assert state.master is not None
    if storage is Storage.FULL:
        return state.master
    return join_master(state.master, weight.to(state.master.device), state.exp_avg_sq)[0]


def _write(state: State, storage: Storage, weight: Tensor, slot: str, values: Tensor) -> None:
    if slot == "exp_avg":
        state.exp_avg.copy_(values)
    elif slot == "exp_avg_sq":
        tagged = values.contiguous().copysign(state.exp_avg_sq) if storage is Storage.LOW_BITS else values
        state.exp_avg_sq.copy_(tagged)
    elif storage is Storage.WEIGHT:
        weight.copy_(values)
    elif storage is Storage.FULL:
        assert state.master is not None
        state.master.copy_(values)
        weight.copy_(round_to_bf16(values.contiguous()) if weight.dtype == torch.bfloat16 else values)
    else:
        assert state.master is not None
        low, rounded, tagged = split_master(values.contiguous(), state.exp_avg_sq)
        state.master.copy_(low)
        state.exp_avg_sq.copy_(tagged)
        weight.copy_(rounded)


def _check_weights(weights: Sequence[Tensor], groups: Sequence[int]) -> None:
    if len(weights) != len(groups):
        raise ValueError(f"{len(weights)} weights with {len(groups)} parameter groups")
    for number, weight in enumerate(weights):
        if weight.dim() != 1 or not weight.is_contiguous():
            raise ValueError(f"weight {number} has shape {tuple(weight.shape)}, expected a flat contiguous view")
        if weight.dtype not in GRADIENT_DTYPES:
            raise ValueError(f"weight {number} is {weight.dtype}, expected float32, bfloat16 or float16")
        if weight.device != weights[0].device:
            raise ValueError(f"weights are on {weights[0].device} and on {weight.device}, expected one device")
