"""The small model of :mod:`support.engine_case` with offloaded optimizer states, on the host or on what looks like a
device with memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.engine_case import Case

from pretrain.config.schema import Config, OffloadConfig
from pretrain.engines import megatron_offload
from pretrain.optim.offload import states
from pretrain.optim.offload.choose import even_plan
from pretrain.optim.offload.device import Event, InlineDevice
from pretrain.optim.offload.schedule import Operation


@dataclass(frozen=True)
class OffloadCase(Case):
    """``device``: ``host``, ``prompt`` (copies to a host of its own, done when given) or ``late`` (done when waited
    for)."""

    offload: OffloadConfig = field(default_factory=lambda: OffloadConfig(enabled=True, subgroup_size=64))
    device: str = "host"

    def config(self) -> Config:
        config = super().config()
        return replace(config, optimizer=replace(config.optimizer, offload=self.offload))

    def without_offload(self) -> Case:
        """The same layout with the optimizer states where they are by default."""
        return replace(self, offload=OffloadConfig())

    @property
    def has_buckets(self) -> bool:
        return self.offload.enabled or super().has_buckets


class PromptDevice(InlineDevice):
    """Gradients and weights are staged as on a GPU; every operation is done when it is given."""

    host_weights = False


class LateDevice(PromptDevice):
    """Nothing is done before something waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._given: list[Callable[[], None]] = []

    def run(self, operation: Operation, waits: Iterable[Event], work: Callable[[], None]) -> Event:
        self._given.append(work)
        return super().run(operation, waits, lambda: None)

    def hold(self, events: Iterable[Event]) -> None:
        self._do()

    def finish(self, events: Iterable[Event]) -> None:
        self._do()

    def _do(self) -> None:
        given, self._given = self._given, []
        for work in given:
            work()


@contextmanager
def device_of(case: Case) -> Iterator[None]:
    """Inside, states are made on the device that ``case`` names."""
    kind = getattr(case, "device", "host")
    if kind == "host":
        yield
        return
    before = (states.choose_device, states.choose_plan, megatron_offload.choose_device)

    def plan(shape: Any, config: OffloadConfig, device: Any) -> Any:
        share = [0.0 if isinstance(f, str) else f for f in (config.fraction, config.resident_fraction)]
        return even_plan(shape, *share, overlap=config.overlap)

    def device(weights: Any, config: OffloadConfig) -> InlineDevice:
        return PromptDevice() if kind == "prompt" else LateDevice()

    states.choose_device = megatron_offload.choose_device = device  # type: ignore[assignment]
    states.choose_plan = plan
    try:
        yield
    finally:
        states.choose_device, states.choose_plan, megatron_offload.choose_device = before


def build(case: Case, tied: bool = False) -> Any:
    from support.engine_case import PackedNet

    from pretrain.engines.deepspeed import DeepSpeedEngine

    with device_of(case):
        return DeepSpeedEngine(PackedNet(tied), case.config(), torch.device("cpu"))


def exported(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's fragments, put together by slot and name, and the weights that the forward pass reads."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for fragment in engine.export_state():
        values = fragment.values.detach().clone()
        found.setdefault(f"{fragment.slot}:{fragment.name}", []).append((fragment.start, values))
    state = {key: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])]) for key, parts in found.items()}
    if engine.module is not None:
        state |= {f"read:{name}": value.detach().clone() for name, value in engine.module.named_parameters()}
    return state


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names that differ in any bit, or exist on one side only."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))
