"""Subgroups cover every element once; operations and waits give the sequential program whatever queues do."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim.offload.schedule import (
    Kind,
    Operation,
    Order,
    Place,
    Plan,
    Queue,
    Resource,
    early_operations,
    gradient_operation,
    update_operations,
)
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, tuple[Subgroup, ...]]:
    targets = draw(st.lists(st.builds(Target, st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=8))
    subgroups = cut_subgroups(targets, draw(st.integers(1, 15)))
    places = tuple(draw(st.sampled_from(list(Place))) for _ in subgroups)
    device = draw(st.permutations([i for i, place in enumerate(places) if place is not Place.CPU]))
    cpu = draw(st.permutations([i for i, place in enumerate(places) if place is Place.CPU]))
    streamed = sum(place is Place.STREAM for place in places)
    plan = Plan(
        places=places,
        device_order=tuple(device),
        cpu_order=tuple(cpu),
        num_slots=draw(st.integers(1, 5)),
        num_early=draw(st.integers(0, streamed)),
        num_host_buffers=draw(st.integers(1, 4)),
        early_gradients=draw(st.booleans()),
    )
    return plan, subgroups


def program(
    plan: Plan, subgroups: tuple[Subgroup, ...], *, host_weights: bool = False, weight_down: bool = False
) -> list[Operation]:
    """Every operation of a step, early ones too."""
    operations = list(early_operations(plan))
    if plan.early_gradients and not host_weights:
        operations += [gradient_operation(plan, i) for i in plan.cpu_order]
    return operations + update_operations(plan, subgroups, host_weights=host_weights, weight_down=weight_down)


@settings(deadline=None)
@given(
    st.lists(st.builds(Target, st.integers(0, 300), st.integers(0, 3)), max_size=12),
    st.integers(1, 120),
)
def test_every_element_lies_in_exactly_one_place_of_one_subgroup(targets: list[Target], size: int) -> None:
    subgroups = cut_subgroups(targets, size)
    covered = {number: [] for number in range(len(targets))}
    for index, subgroup in enumerate(subgroups):
        assert subgroup.index == index
        assert 1 <= subgroup.numel <= size
        at = 0
        for segment in subgroup.segments:
            assert segment.offset == at
            assert segment.numel > 0
            assert targets[segment.target].group == subgroup.group
            covered[segment.target].append((segment.start, segment.stop))
            at += segment.numel
        assert at == subgroup.numel
    for number, ranges in covered.items():
        assert sum(stop - start for start, stop in ranges) == targets[number].numel
        assert all(before[1] == after[0] for before, after in pairwise(sorted(ranges)))


@settings(deadline=None)
@given(st.lists(st.builds(Target, st.integers(0, 300), st.integers(0, 3)), max_size=12), st.integers(1, 120))
def test_only_the_last_subgroup_of_a_group_is_ragged(targets: list[Target], size: int) -> None:
    subgroups = cut_subgroups(targets, size)
    for before, after in pairwise(subgroups):
        assert before.numel == size or before.group != after.group
        assert before.group <= after.group


def test_a_size_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="subgroup_size is 0"):
        cut_subgroups([Target(4, 0)], 0)


@settings(deadline=None)
@given(plans(), st.booleans(), st.booleans())
def test_every_subgroup_is_updated_once_between_its_transfers(
    case: tuple[Plan, tuple[Subgroup, ...]], host_weights: bool, weight_down: bool
) -> None:
    plan, subgroups = case
    operations = program(plan, subgroups, host_weights=host_weights, weight_down=weight_down)
    kinds: dict[int, list[Kind]] = {subgroup.index: [] for subgroup in subgroups}
    for operation in operations:
        kinds[operation.subgroup].append(operation.kind)
    staged = [Kind.GRADIENT_DOWN, *([Kind.WEIGHT_DOWN] if weight_down else []), Kind.CPU_UPDATE, Kind.WEIGHT_UP]
    expected = {
        Place.CPU: [Kind.CPU_UPDATE] if host_weights else staged,
        Place.STREAM: [Kind.PREFETCH, Kind.DEVICE_UPDATE, Kind.FLUSH],
        Place.RESIDENT: [Kind.DEVICE_UPDATE],
    }
    for subgroup, place in enumerate(plan.places):
        assert kinds[subgroup] == expected[place]
    updates = [o.subgroup for o in operations if o.kind is Kind.DEVICE_UPDATE]
    assert updates == list(plan.device_order)
    assert [o.subgroup for o in operations if o.kind is Kind.CPU_UPDATE] == list(plan.cpu_order)


@settings(deadline=None)
@given(plans())
def test_early_state_has_buffers_of_its_own_and_late_state_uses_all_of_them_in_turn(
    case: tuple[Plan, tuple[Subgroup, ...]],
) -> None:
    plan, _ = case
    early = [operation.buffer for operation in early_operations(plan)]
    assert early == list(range(plan.num_early))
    buffers = max(plan.num_early, plan.num_slots)
    assert [plan.slot(turn) for turn in range(len(plan.streamed))] == [t % buffers for t in range(len(plan.streamed))]


def run_in_any_order(operations: list[Operation], rounds: int, pick: random.Random) -> dict[Resource, tuple]:
    """Values after steps whose queues run in order, but otherwise as ``pick`` has it, with the waits of Order.

    A value is the history of what made it: an operation writes what it is and what it read."""
    order: Order[int] = Order()
    queues: dict[Queue, list[int]] = {queue: [] for queue in Queue}
    issued: list[tuple[Operation, list[int]]] = []
    for _ in range(rounds):
        for operation in operations:
            issued.append((operation, order.waits(operation)))
            order.issued(operation, len(issued) - 1)
            queues[operation.queue].append(len(issued) - 1)
    done: set[int] = set()
    values: dict[Resource, int] = {}
    while len(done) < len(issued):
        ready = [queue[0] for queue in queues.values() if queue and done.issuperset(issued[queue[0]][1])]
        assert ready, "queues wait for each other"
        number = pick.choice(ready)
        operation = issued[number][0]
        queues[operation.queue].pop(0)
        read = tuple(values.get(resource, 0) for resource in operation.reads)
        for resource in operation.writes:
            values[resource] = hash((operation.kind, operation.subgroup, resource, read))
        done.add(number)
    return values


@settings(max_examples=60, deadline=None)
@given(plans(), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_any_legal_interleaving_of_two_steps_gives_the_values_of_the_sequential_program(
    case: tuple[Plan, tuple[Subgroup, ...]], host_weights: bool, weight_down: bool, seed: int
) -> None:
    plan, subgroups = case
    operations = program(plan, subgroups, host_weights=host_weights, weight_down=weight_down)
    values: dict[Resource, int] = {}
    for operation in operations * 2:
        read = tuple(values.get(resource, 0) for resource in operation.reads)
        for resource in operation.writes:
            values[resource] = hash((operation.kind, operation.subgroup, resource, read))
    assert run_in_any_order(operations, 2, random.Random(seed)) == values


@settings(deadline=None)
@given(plans())
def test_both_sides_are_issued_by_the_share_of_elements_done(case: tuple[Plan, tuple[Subgroup, ...]]) -> None:
    plan, subgroups = case
    operations = update_operations(plan, subgroups, host_weights=True, weight_down=False)
    sides = (set(plan.device_order), set(plan.cpu_order))
    totals = [sum(subgroups[i].numel for i in side) for side in sides]
    done = [0, 0]
    last = 0.0
    for operation in operations:
        if operation.kind not in (Kind.DEVICE_UPDATE, Kind.CPU_UPDATE):
            continue
        side = int(operation.subgroup in sides[1])
        share = done[side] / totals[side]
        assert share >= last
        last = share
        done[side] += subgroups[operation.subgroup].numel


def test_what_is_only_read_does_not_pile_up() -> None:
    order: Order[int] = Order()
    gradient, state = Resource("gradient", 0), Resource("state", 0)
    for step in range(50):
        order.issued(Operation(Kind.DEVICE_UPDATE, 0, reads=(gradient,), writes=(state,)), step)
    assert order.pending("gradient") == [49]


def test_writing_waits_for_reads_of_other_queues_and_not_of_its_own() -> None:
    order: Order[str] = Order()
    slot = Resource("slot", 0)
    order.issued(Operation(Kind.PREFETCH, 0, writes=(slot,)), "prefetch")
    order.issued(Operation(Kind.DEVICE_UPDATE, 0, reads=(slot,), writes=(slot,)), "update")
    flush = Operation(Kind.FLUSH, 0, reads=(slot,))
    assert order.waits(flush) == ["update"]
    order.issued(flush, "flush")
    assert order.waits(Operation(Kind.PREFETCH, 1, writes=(slot,))) == ["update", "flush"]
    assert order.waits(Operation(Kind.FLUSH, 1, writes=(slot,))) == ["update"]
