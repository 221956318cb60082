"""Masters that are read after every step: they wait for no state on its way home, whatever the plan."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.choose import even_plan
from pretrain.optim.offload.schedule import Kind, Operation, Place
from pretrain.optim.offload.simulated import SimulatedDevice
from pretrain.optim.offload.states import GroupSettings, OffloadedStates


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_what_is_read_after_every_step_waits_for_no_state_on_its_way_home(seed: int, fraction: float) -> None:
    """Whatever the plan: with every flush still to come the small masters can be read."""

    class Stuck(SimulatedDevice):
        waited_for: ClassVar[set[Kind]] = set()

        def run(self, operation: Operation, waits: Any, work: Any) -> Any:
            event = super().run(operation, waits, work)
            kinds[id(event)] = operation.kind
            kept.append(event)
            return event

        def finish(self, events: Any) -> None:
            events = list(events)
            self.waited_for.update(kinds[id(event)] for event in events if id(event) in kinds)
            super().finish(events)

    kinds: dict[int, Kind] = {}
    kept: list[Any] = []
    sizes = (90, 5, 70)
    with Stuck(seed) as device:
        weights = [device.model_tensor(torch.ones(n, dtype=torch.bfloat16), f"weight {n}") for n in sizes]
        config = OffloadConfig(enabled=True, subgroup_size=20, fraction=fraction)
        shape = OffloadedStates([torch.ones(n).bfloat16() for n in sizes], [0] * 3, config,
                                gradient_dtype=torch.float32, apart=[False, True, False]).shape  # fmt: skip
        plan = even_plan(shape, fraction, 0.0, overlap=True)
        states = OffloadedStates(
            weights, [0] * 3, config, gradient_dtype=torch.float32, apart=[False, True, False], device=device, plan=plan
        )
        gradients = [device.model_tensor(torch.ones(n), f"gradient {n}") for n in sizes]
        Stuck.waited_for.clear()
        states.update(gradients, [GroupSettings(0.1, (0.9, 0.95), 1e-8, 0.0)], 1)
        first = states.read(1, "master", alone=True)
        assert Kind.FLUSH not in Stuck.waited_for
        assert Kind.DEVICE_UPDATE in Stuck.waited_for
        states.replan(plan)
        assert Place.RESIDENT in states.plan.places
        assert torch.equal(first, states.read(1, "master"))
        assert float(first[0]) == pytest.approx(0.9, rel=1e-3)
