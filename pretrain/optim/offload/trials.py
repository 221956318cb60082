"""Random small trainings for proofs of the executor: one gives the same bits with any plan, on any device."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol

import torch
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import Device, InlineDevice
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.states import SLOTS, GroupSettings, OffloadedStates
from pretrain.optim.offload.subgroups import Target, cut_subgroups

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SETTINGS = (GroupSettings(1e-2, (0.9, 0.95), 1e-8, 0.1), GroupSettings(3e-3, (0.8, 0.99), 1e-6, 0.0))


@dataclass(frozen=True)
class Step:
    """``given``: targets that have a gradient; ``scale``: on all gradients; ``dropped``: not updated after all;
    ``looks``: state is read after it."""

    given: tuple[bool, ...]
    scale: float = 1.0
    dropped: bool = False
    looks: bool = False


@dataclass(frozen=True)
class Training:
    """Weights and steps, whatever the plan. Gradients have their weight's dtype; ``gradient_dtype`` holds all of them
    exactly."""

    seed: int
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    groups: tuple[int, ...]
    master: Literal["full", "low_bits"]
    gradient_dtype: torch.dtype
    steps: tuple[Step, ...]

    def values(self, step: int, target: int) -> Tensor:
        """Gradients of a step (from 1), or of step 0 the initial weights, as FP32."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + step * 101 + target)
        return torch.randn(self.sizes[target], generator=generator)


@dataclass(frozen=True)
class Way:
    """How a training is gone through. ``overlaps``: early state and gradients are asked for in the backward pass."""

    plan: Plan
    subgroup_size: int
    overlaps: bool = True
    second_plan: Plan | None = None


@dataclass
class Outcome:
    """``seen``: weights as each forward pass read them; ``state``: by target and slot, at the end and after looks."""

    seen: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)

    def difference(self, other: Outcome) -> str | None:
        """Where the bits first differ."""
        for name, mine, others in (("weights", self.seen, other.seen), ("state", self.state, other.state)):
            if len(mine) != len(others):
                return f"{name}: {len(mine)} tensors and {len(others)}"
            for number, (a, b) in enumerate(zip(mine, others, strict=True)):
                if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    wrong = int((a != b).sum())
                    return f"{name}: tensor {number} of {len(mine)} differs in {wrong} of {a.numel()} elements"
        return None


def random_training(source: random.Random, *, max_targets: int = 5, max_size: int = 24, max_steps: int = 4) -> Training:
    """Ragged sizes, mixed dtypes and groups; some steps dropped, some gradients missing."""
    count = source.randint(1, max_targets)
    dtypes = tuple(source.choice(DTYPES) for _ in range(count))
    held = [torch.float32, *(dtype for dtype in DTYPES[:2] if set(dtypes) == {dtype})]
    return Training(
        seed=source.randrange(2**20),
        sizes=tuple(source.randint(1, max_size) for _ in range(count)),
        dtypes=dtypes,
        groups=tuple(source.randint(0, len(SETTINGS) - 1) for _ in range(count)),
        master=source.choice(["full", "low_bits"]),
        gradient_dtype=source.choice(held),
        steps=tuple(
            Step(
                given=tuple(source.random() < 0.85 for _ in range(count)),
                scale=source.choice([1.0, 0.37]),
                dropped=source.random() < 0.25,
                looks=source.random() < 0.15,
            )
            for _ in range(source.randint(1, max_steps))
        ),
    )


def random_way(source: random.Random, training: Training) -> Way:
    size = source.choice([source.randint(2, 16), sum(training.sizes) + 1])
    count = num_subgroups(training, size)
    return Way(
        random_plan(source, count),
        size,
        source.random() < 0.8,
        random_plan(source, count) if source.random() < 0.25 else None,
    )


def random_plan(source: random.Random, count: int) -> Plan:
    """Any legal plan for ``count`` subgroups."""
    chance = source.choice([(1, 1, 1), (1, 3, 0), (3, 1, 0), (0, 1, 0), (1, 0, 0)])
    places = tuple(source.choices(list(Place), chance)[0] for _ in range(count))
    device = [i for i in range(count) if places[i] is not Place.CPU]
    cpu = [i for i in range(count) if places[i] is Place.CPU]
    source.shuffle(device)
    source.shuffle(cpu)
    streamed = sum(place is Place.STREAM for place in places)
    return Plan(
        places,
        tuple(device),
        tuple(cpu),
        num_slots=source.randint(1, 4),
        num_early=source.choice([0, source.randint(0, streamed), streamed]),
        num_host_buffers=source.randint(1, 3),
        early_gradients=source.random() < 0.5,
    )


def num_subgroups(training: Training, subgroup_size: int) -> int:
    """How many subgroups the training's weights are cut into: by parameter group and dtype."""
    kinds = sorted({(group, str(dtype)) for group, dtype in zip(training.groups, training.dtypes, strict=True)})
    keys = [(group, str(dtype)) for group, dtype in zip(training.groups, training.dtypes, strict=True)]
    targets = [Target(numel, kinds.index(key)) for numel, key in zip(training.sizes, keys, strict=True)]
    return len(cut_subgroups(targets, subgroup_size))


def go_inline(training: Training, way: Way) -> Outcome:
    """The training on the host, one thing after the other."""
    outcome = Outcome()
    weights = [_initial(training, target) for target in range(len(training.sizes))]
    states = _states(training, way, weights, InlineDevice(threads=1))
    number = 0
    for at, step in enumerate(training.steps, start=1):
        outcome.seen += [weight.clone() for weight in weights]
        if way.overlaps:
            states.start_early()
        gradients = [_gradient(training, at, target) if has else None for target, has in enumerate(step.given)]
        if step.dropped:
            states.discard()
        else:
            number += 1
            states.update(gradients, SETTINGS, number, step.scale)
        if step.looks:
            _read(states, training, outcome)
    outcome.seen += [weight.clone() for weight in weights]
    _read(states, training, outcome)
    return outcome


class ModelDevice(Device, Protocol):
    """A device on which a trial plays the model too, through the model's queue: see
    :class:`~pretrain.optim.offload.simulated.SimulatedDevice`."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def model_tensor(self, values: Tensor, label: str = ...) -> Tensor: ...

    def model_writes(self, tensor: Tensor, values: Tensor) -> None: ...

    def model_reads(self, tensor: Tensor, then: Callable[[Tensor], None] | None = None) -> None: ...

    def model_frees(self, tensor: Tensor) -> None: ...

    def settle(self) -> None: ...


Change = Callable[[OffloadedStates], None]


def go_beside(
    training: Training, way: Way, device: ModelDevice, *, seed: int = 0, change: Change | None = None
) -> Outcome:
    """The training on ``device`` (a context that is entered here), the model playing its part on its own queue.

    Args:
        seed: of when the model and the program do what they may do at any time.
        change: is given the states once they are made, before the first step.

    Raises:
        RaceError: what ran was at fault.
    """
    source = random.Random(seed)
    outcome = Outcome()
    targets = range(len(training.sizes))
    with device:
        weights = [device.model_tensor(_initial(training, target), f"weight {target}") for target in targets]
        states = _states(training, way, weights, device)
        if change is not None:
            change(states)
        number = 0
        for at, step in enumerate(training.steps, start=1):
            # In order of the model's queue, so of the list.
            for weight in weights:
                device.model_reads(weight, outcome.seen.append)
            gradients = _backward(training, at, states, weights, way, device, source)
            if step.dropped:
                states.discard()
            else:
                number += 1
                states.update(gradients, SETTINGS, number, step.scale)
            # The memory of gradients is given on at once, and the caller's list is its own.
            for gradient in gradients:
                if gradient is not None:
                    device.model_frees(gradient)
            gradients.clear()
            if step.looks:
                _read(states, training, outcome)
            if way.second_plan is not None and at == 1:
                states.replan(way.second_plan)
        for weight in weights:
            device.model_reads(weight, outcome.seen.append)
        device.settle()
        _read(states, training, outcome)
    return outcome


def _backward(
    training: Training,
    at: int,
    states: OffloadedStates,
    weights: Sequence[Tensor],
    way: Way,
    device: ModelDevice,
    source: random.Random,
) -> list[Tensor | None]:
    """Gradients, made in some order; each may be told of once it is final, and the states be asked to begin."""
    step = training.steps[at - 1]
    gradients: list[Tensor | None] = [None] * len(training.sizes)
    order = [target for target, given in enumerate(step.given) if given]
    source.shuffle(order)
    begin = source.randint(0, len(order))
    share_told = source.choice([0.5, 1.0])
    for count, target in enumerate(order):
        if way.overlaps and count == begin:
            states.start_early()
        elif source.random() < 0.5:
            states.advance_early()
        values = _gradient(training, at, target)
        gradient = device.model_tensor(torch.zeros_like(values), f"gradient {target}")
        # Accumulation: the first value is not the final one.
        device.model_writes(gradient, values)
        gradients[target] = gradient
        if way.overlaps and source.random() < share_told:
            states.gradient_ready(target, gradient)
    # That gradients are final does not mean that the pass is over: it reads weights to its end.
    for weight in weights:
        device.model_reads(weight)
    return gradients


def _states(training: Training, way: Way, weights: Sequence[Tensor], device: Device) -> OffloadedStates:
    config = OffloadConfig(enabled=True, subgroup_size=way.subgroup_size, master=training.master)
    return OffloadedStates(
        weights,
        training.groups,
        config,
        gradient_dtype=training.gradient_dtype,
        masters=[training.values(0, target) for target in range(len(training.sizes))],
        device=device,
        plan=way.plan,
    )


def _initial(training: Training, target: int) -> Tensor:
    return training.values(0, target).to(training.dtypes[target])


def _gradient(training: Training, step: int, target: int) -> Tensor:
    return training.values(step, target).to(training.dtypes[target])


def _read(states: OffloadedStates, training: Training, outcome: Outcome) -> None:
    for target in range(len(training.sizes)):
        outcome.state += [states.read(target, slot) for slot in SLOTS]
