"""No device memory at a bad moment: values are those of training with enough, and nothing is left half-way."""

from dataclasses import replace

import pytest
import torch
from support.small_states import SIZES, content, new_gradients, new_plan, new_states, new_weights, same

from pretrain.optim.offload.device import InlineDevice
from pretrain.optim.offload.simulated import SimulatedDevice
from pretrain.optim.offload.trials import SETTINGS


class Short(InlineDevice):
    """Device memory for ``room`` more allocations (None: for all)."""

    def __init__(self):
        super().__init__(threads=1)
        self.room = None
        self.asked = 0

    def empty_device(self, num_bytes):
        self.asked += 1
        if self.room is not None:
            if not self.room:
                raise torch.OutOfMemoryError("of the device")
            self.room -= 1
        return super().empty_device(num_bytes)


def _trained(steps):
    """Weights and state after steps on a device that has memory."""
    weights = new_weights()
    states = new_states(InlineDevice(threads=1), new_plan("CCCCCCC"), weights)
    for step in range(1, steps + 1):
        states.update(new_gradients(step), SETTINGS, step)
    return [*weights, *content(states)]


@pytest.mark.parametrize("room", range(5))
def test_early_state_without_memory_for_it_comes_in_its_turn(room, caplog):
    device, weights = Short(), new_weights()
    # Subgroup 6 is smaller than the others: buffers of the ring have to hold what early ones were for.
    plan = replace(new_plan("SSSSSSS", num_slots=1, num_early=5), device_order=(6, 0, 1, 2, 3, 4, 5))
    states = new_states(device, plan, weights)
    device.room = room
    for step in (1, 2, 3):
        states.start_early()
        states.advance_early()
        states.update(new_gradients(step), SETTINGS, step)
    assert same([*weights, *content(states)], _trained(3))
    ring = replace(plan, num_early=1)
    assert states.plan == ring
    assert [r.message for r in caplog.records] == [
        "offloaded optimizer state: no device memory for 4 buffers of early state; from now on 1 of 7 streamed "
        "subgroups come before the update"
    ]
    assert states.early_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_early_state_that_is_given_up_races_with_nothing(seed):
    with SimulatedDevice(seed) as device:
        weights = new_weights(device)
        plan = new_plan("SSSSSSC", num_slots=2, num_early=6)
        states = new_states(device, plan, weights)
        give = device.empty_device
        for step in (1, 2, 3):
            if step == 2:
                rooms = iter(range(seed % 4))

                def short(num_bytes, rooms=rooms):
                    if next(rooms, None) is None:
                        raise torch.OutOfMemoryError("of the device")
                    return give(num_bytes)

                device.empty_device = short
            states.start_early()
            gradients = (
                new_gradients(step, device) if step != 2 else [device.model_tensor(g) for g in new_gradients(step)]
            )
            states.update(gradients, SETTINGS, step)
            assert states.plan.num_early == (6 if step == 1 else 2)
        found = content(states)
    assert same(found, _trained(3)[len(SIZES) :])


def test_the_backward_pass_asks_for_memory_once_when_there_is_none():
    device = Short()
    states = new_states(device, new_plan("SSSSSSS", num_slots=1, num_early=5), new_weights())
    device.room, device.asked = 0, 0
    states.start_early()
    for _ in range(5):
        states.advance_early()
    assert device.asked == 1
    device.room = None
    states.update(new_gradients(1), SETTINGS, 1)
    assert states.plan.num_early == 5


@pytest.mark.parametrize("room", range(6))
@pytest.mark.parametrize("again", [0, 1, None])
def test_a_plan_that_does_not_fit_leaves_everything_as_it_was(room, again):
    device, weights = Short(), new_weights()
    plan = new_plan("SCSSRCC", num_slots=3, num_early=3, early_gradients=True)
    states = new_states(device, plan, weights)
    states.update(new_gradients(1), SETTINGS, 1)
    before = content(states)
    device.room = room
    if again is None:
        # What was given back can be had again.
        give, device.empty_device = device.empty_device, None

        def all_or_nothing(num_bytes):
            try:
                return give(num_bytes)
            except torch.OutOfMemoryError:
                device.empty_device = super(Short, device).empty_device
                raise

        device.empty_device = all_or_nothing
    with pytest.raises(torch.OutOfMemoryError):
        states.replan(new_plan("RCRRSSS", num_slots=3))
    assert states.plan == plan
    assert same(content(states), before)
    if again is not None:
        # Buffers are missing: that can be said before anything is changed, again and again.
        device.room = again
        states.start_early()
        states.gradient_ready(1, new_gradients(2)[1])
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                states.update(new_gradients(2), SETTINGS, 2)
        assert same(content(states), before)
        states.discard()
        device.room = None
    states.update(new_gradients(2), SETTINGS, 2)
    assert same([*weights, *content(states)], _trained(2))
