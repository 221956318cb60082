"""The executor step by step: the order of what it gives to queues, steps that are dropped or fail, memory it takes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_states import COUNT, SIZES, content, new_gradients, new_plan, new_states, new_weights, same

from pretrain.optim.offload.device import InlineDevice
from pretrain.optim.offload.schedule import Kind
from pretrain.optim.offload.simulated import SimulatedDevice
from pretrain.optim.offload.trials import SETTINGS, Step, Training, Way, go_beside, random_plan


class Recording(InlineDevice):
    """Does everything at once, as if the model were on another side, and remembers what it was given."""

    host_weights = False

    def __init__(self):
        super().__init__(threads=1)
        self.given = []

    def run(self, operation, waits, work):
        self.given.append(operation)
        return super().run(operation, waits, work)


class UpdateError(FloatingPointError):
    pass


def _fail_at(device, number):
    """The ``number``-th AdamW call of ``device`` from now on fails."""
    calls = iter(range(number + 1))
    update = device.adamw_

    def adamw_(*args, **kwargs):
        if next(calls) == number:
            raise UpdateError("of the kernel")
        update(*args, **kwargs)

    device.adamw_ = adamw_


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_subgroup_is_updated_once_in_the_planned_order_and_slots(seed):
    plan = random_plan(random.Random(seed), COUNT)
    device = Recording()
    states = new_states(device, plan, new_weights())
    states.start_early()
    early = list(device.given)
    assert [o.subgroup for o in early] == list(plan.streamed[: plan.num_early])
    assert all(o.kind is Kind.PREFETCH for o in early)
    states.update(new_gradients(1), SETTINGS, 1)
    of_kind = {kind: [o.subgroup for o in device.given if o.kind is kind] for kind in Kind}
    assert of_kind[Kind.DEVICE_UPDATE] == list(plan.device_order)
    assert of_kind[Kind.CPU_UPDATE] == of_kind[Kind.WEIGHT_UP] == of_kind[Kind.GRADIENT_DOWN] == list(plan.cpu_order)
    assert of_kind[Kind.PREFETCH] == of_kind[Kind.FLUSH] == list(plan.streamed)
    assert of_kind[Kind.WEIGHT_DOWN] == []
    for turn, subgroup in enumerate(plan.streamed):
        mine = [o for o in device.given if o.subgroup == subgroup]
        assert [o.kind for o in mine] == [Kind.PREFETCH, Kind.DEVICE_UPDATE, Kind.FLUSH]
        assert {o.buffer for o in mine} == {plan.slot(turn)}


def test_the_weight_goes_to_the_host_only_where_it_holds_part_of_the_master():
    for master, expected in (("full", 0), ("low_bits", 3)):
        device = Recording()
        states = new_states(device, new_plan(), new_weights(), master=master)
        states.update(new_gradients(1), SETTINGS, 1)
        assert sum(o.kind is Kind.WEIGHT_DOWN for o in device.given) == expected


def test_gradients_go_to_the_host_when_the_last_of_a_subgroup_is_told():
    device = Recording()
    states = new_states(device, new_plan("CCCCCCC", early_gradients=True), new_weights())
    gradients = new_gradients(1)
    # Elements 4..8 are of targets 0 (7 elements) and 1.
    states.gradient_ready(0, gradients[0])
    assert [o.subgroup for o in device.given] == [0]
    states.gradient_ready(1, gradients[1])
    assert [o.subgroup for o in device.given] == [0, 1, 2]
    states.update(gradients, SETTINGS, 1)
    down = [o.subgroup for o in device.given if o.kind is Kind.GRADIENT_DOWN]
    assert sorted(down) == list(range(COUNT))


def test_asking_for_early_state_twice_brings_it_once():
    device = Recording()
    states = new_states(device, new_plan(num_early=3), new_weights())
    states.start_early()
    states.start_early()
    assert len(device.given) == 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "plan", [new_plan(num_early=3, early_gradients=True), new_plan("SSSSSSS", num_early=5), new_plan()]
)
def test_a_dropped_step_changes_nothing(seed, plan):
    with SimulatedDevice(seed) as device:
        weights = new_weights(device)
        states = new_states(device, plan, weights)
        states.update(new_gradients(1, device), SETTINGS, 1)
        before = content(states)
        for step in (2, 3):
            states.start_early()
            gradients = new_gradients(step, device)
            for target in (1, 0, 3):
                states.gradient_ready(target, gradients[target])
            states.discard()
            for gradient in gradients:
                device.model_frees(gradient)
        assert same(content(states), before)
        states.discard()
        states.update(new_gradients(4, device), SETTINGS, 2)
        after = content(states)
    inline = new_states(InlineDevice(threads=1), new_plan("CCCCCCC"), new_weights())
    inline.update(new_gradients(1), SETTINGS, 1)
    inline.update(new_gradients(4), SETTINGS, 2)
    assert same(after, content(inline))


def test_without_overlap_nothing_is_under_way_after_an_update():
    for seed in range(8):
        with SimulatedDevice(seed) as device:
            states = new_states(device, new_plan(), new_weights(device), overlap=False)
            states.update(new_gradients(1, device), SETTINGS, 1)
            flushed = {name for name in device.trace if name.startswith("flush")}
            assert flushed == {"flush of 0", "flush of 2", "flush of 3"}


def test_synchronize_brings_all_state_home():
    flushed = {f"flush of {i}" for i in (0, 2, 3)}
    late = []
    for seed in range(12):
        with SimulatedDevice(seed) as device:
            states = new_states(device, new_plan(), new_weights(device))
            states.update(new_gradients(1, device), SETTINGS, 1)
            late.append(not flushed <= set(device.trace))
            states.synchronize()
            assert flushed <= set(device.trace)
    # An update by itself does not wait for state on its way home.
    assert any(late)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("begun", [False, True])
def test_replanning_between_steps_changes_no_value(seed, begun):
    source = random.Random(seed)
    with SimulatedDevice(seed) as device:
        states = new_states(device, random_plan(source, COUNT), new_weights(device))
        for step in (1, 2, 3):
            if begun:
                states.start_early()
            if step == 2:
                # Also while state is on its way to the device for this step.
                states.replan(random_plan(source, COUNT))
            states.update(new_gradients(step, device), SETTINGS, step)
        found = content(states)
    inline = new_states(InlineDevice(threads=1), new_plan(), new_weights())
    for step in (1, 2, 3):
        inline.update(new_gradients(step), SETTINGS, step)
    assert same(found, content(inline))


@pytest.mark.parametrize("number", [0, 3, 6])
def test_a_failed_update_is_told_and_everything_after_it_refused(number):
    device = InlineDevice(threads=1)
    states = new_states(device, new_plan(), new_weights())
    states.update(new_gradients(1), SETTINGS, 1)
    _fail_at(device, number)
    with pytest.raises(UpdateError):
        states.update(new_gradients(2), SETTINGS, 2)
    _assert_refuses(states, None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("number", [0, 3, 6])
def test_an_update_that_fails_later_is_told_before_its_state_is_taken_for_whole(seed, number):
    with SimulatedDevice(seed) as device:
        states = new_states(device, new_plan(), new_weights(device))
        states.update(new_gradients(1, device), SETTINGS, 1)
        states.synchronize()
        _fail_at(device, number)

        def update_and_read():
            states.update(new_gradients(2, device), SETTINGS, 2)
            return states.read(0, "master")

        with pytest.raises((UpdateError, RuntimeError)) as raised:
            update_and_read()
        assert isinstance(raised.value.__cause__ or raised.value, UpdateError)
        _assert_refuses(states, device)


def _assert_refuses(states, device):
    for call in (
        lambda: states.update(new_gradients(3, device), SETTINGS, 3),
        lambda: states.read(0, "master"),
        lambda: states.write(0, "exp_avg", torch.zeros(SIZES[0])),
        lambda: states.replan(new_plan("CCCCCCC")),
        states.start_early,
    ):
        with pytest.raises(RuntimeError, match=r"failed half-way.*resume from the last checkpoint"):
            call()


@pytest.mark.parametrize(
    ("gradients", "step", "message"),
    [
        (lambda: new_gradients(2)[:3], 2, "3 gradients for 4 weights"),
        (lambda: [new_gradients(2)[0].repeat(2), *new_gradients(2)[1:]], 2, r"gradient 0 is \(14,\)"),
        (lambda: [g.double() for g in new_gradients(2)], 2, r"gradient 0 is torch.float64"),
        (lambda: [new_gradients(2)[0].repeat_interleave(2)[::2], *new_gradients(2)[1:]], 2, r"with strides \(2,\)"),
        (lambda: new_gradients(2), 0, "steps of the optimizer count from 1"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_done(gradients, step, message):
    states = new_states(InlineDevice(threads=1), new_plan(), new_weights())
    states.update(new_gradients(1), SETTINGS, 1)
    before = content(states)
    with pytest.raises(ValueError, match=message):
        states.update(gradients(), SETTINGS, step)
    assert same(content(states), before)
    states.update(new_gradients(2), SETTINGS, 2)
    assert not same(content(states), before)


@pytest.mark.parametrize("seed", range(30))
def test_device_memory_stays_within_what_the_plan_says(seed):
    source = random.Random(seed)
    training = Training(
        seed,
        SIZES,
        (torch.bfloat16,) * len(SIZES),
        (0,) * len(SIZES),
        "full",
        torch.bfloat16,
        tuple(Step((True,) * len(SIZES), dropped=source.random() < 0.3) for _ in range(5)),
    )
    # Early buffers given back by flushes that take until the next step begins.
    plan = new_plan("SSSSSSC", num_slots=1, num_early=source.choice([2, 4, 6]))
    limit = []

    def set_limit(states):
        of_model = 2 * 2 * sum(SIZES)
        limit.append(states.device_bytes + of_model)
        device.limit_bytes(limit[0])

    device = SimulatedDevice(seed)
    go_beside(training, Way(plan, 4), device, seed=seed, change=set_limit)
    assert device.peak_bytes <= limit[0]
