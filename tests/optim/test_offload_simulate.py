"""The fluid model against times worked out by hand, and what must hold of every plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim.offload.bounds import lower_bound
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.schedule import Kind, Order, Place, Plan, Queue
from pretrain.optim.offload.simulate import Lane, Task, rates_of, run_tasks, simulate
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups

# 100 bytes/s alone, 80 up and 60 down when both are busy, half of it while the CPU updates.
LINK = Constants(
    h2d=100,
    d2h=100,
    h2d_duplex=80,
    d2h_duplex=60,
    link_with_cpu=0.5,
    cpu_adam=10,
    cpu_adam_with_link=5,
    gpu_adam=1e9,
    latency=0,
)
FREE = Constants(
    h2d=100,
    d2h=100,
    h2d_duplex=100,
    d2h_duplex=100,
    link_with_cpu=1,
    cpu_adam=10,
    cpu_adam_with_link=10,
    gpu_adam=1e9,
    latency=0,
)


def equal(count: int, numel: int = 10) -> tuple[Subgroup, ...]:
    return cut_subgroups([Target(count * numel, 0)], numel)


def streaming(count: int, slots: int = 3, early: int = 0) -> Plan:
    return Plan((Place.STREAM,) * count, tuple(range(count)), (), slots, early)


def on_cpu(count: int, buffers: int = 3, *, early_gradients: bool = False) -> Plan:
    return Plan((Place.CPU,) * count, (), tuple(reversed(range(count))), 0, 0, buffers, early_gradients)


def ends(tasks: list[Task], constants: Constants = LINK, latency: float = 0.0) -> list[float]:
    return [span.end for span in run_tasks(tasks, rates_of(constants), latency)]


def test_a_transfer_alone_runs_at_the_rate_of_one_way() -> None:
    assert ends([Task("a", Lane.UP, 200)]) == pytest.approx([2.0])


def test_both_ways_run_at_their_duplex_rates_until_one_is_through() -> None:
    # Up: 160 bytes at 80. Down: 2 s at 60, then the 80 bytes that are left at 100.
    assert ends([Task("a", Lane.UP, 160), Task("b", Lane.DOWN, 200)]) == pytest.approx([2.0, 2.8])


def test_queues_of_one_direction_share_it() -> None:
    # 50 each until the small one is through at 2 s, then 100.
    assert ends([Task("a", Lane.UP, 100), Task("b", Lane.UP, 300)]) == pytest.approx([2.0, 4.0])


def test_the_cpu_slows_the_link_down_and_the_link_the_cpu() -> None:
    # Both ways: the CPU at 5 for 4 s; links at 40 and 30.
    assert ends([Task("c", Lane.CPU, 20), Task("a", Lane.UP, 160), Task("b", Lane.DOWN, 120)]) == pytest.approx([4] * 3)


def test_with_one_direction_busy_an_element_takes_the_mean_of_both_times() -> None:
    # (1/10 + 1/5) / 2 = 0.15 s an element; the link at 50.
    assert ends([Task("c", Lane.CPU, 20), Task("a", Lane.UP, 1000)])[0] == pytest.approx(3.0)


def test_latency_is_paid_by_every_operation_and_uses_nothing() -> None:
    tasks = [Task("a", Lane.UP, 100), Task("a", Lane.UP, 100), Task("b", Lane.UP, 100)]
    # All of a is after all of b but for its first second, in which they share.
    found = run_tasks(tasks, rates_of(LINK), 0.5)
    assert [span.end for span in found] == pytest.approx([2.5, 4.0, 2.5])
    assert [span.start for span in found] == pytest.approx([0.0, 2.5, 0.0])


def test_releases_and_dependencies_hold_operations_up() -> None:
    tasks = [
        Task("a", Lane.OTHER, 1.0, release=-2.0),
        Task("b", Lane.OTHER, 1.0, (0,), release=-2.0),
        Task("b", Lane.OTHER, 1.0, (), release=3.0),
    ]
    assert ends(tasks) == pytest.approx([-1.0, 0.0, 4.0])


def test_a_task_that_waits_for_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match="task 0 waits for task 1"):
        run_tasks([Task("a", Lane.UP, 1, (1,)), Task("b", Lane.UP, 1)], rates_of(LINK), 0.0)


def test_work_that_ends_together_ends_at_one_moment() -> None:
    tasks = [Task(str(i), Lane.OTHER, 0.1 + 0.2) for i in range(3)] + [Task("x", Lane.OTHER, 0.3)]
    assert len(set(ends(tasks))) <= 2
    assert ends(tasks) == pytest.approx([0.3] * 4)


def test_streaming_is_one_prefetch_behind_the_other_and_one_flush_after_the_last() -> None:
    # 120 bytes each way, 1.2 s.
    timeline = simulate(streaming(5), equal(5), FREE, Widths(), Window())
    assert timeline.update_s == pytest.approx(6.0)
    assert timeline.exposed_s == pytest.approx(7.2)
    assert timeline.up_bytes == timeline.down_bytes == 600
    assert timeline.busy[Queue.STATE_UP] == pytest.approx(1.0)
    assert timeline.busy[Queue.STATE_DOWN] == pytest.approx(0.8)
    # One filled, one updated, one emptied.
    assert timeline.peak_slots == 3


def test_one_slot_serialises_both_directions() -> None:
    timeline = simulate(streaming(4, slots=1), equal(4), FREE, Widths(), Window())
    assert timeline.exposed_s == pytest.approx(4 * 2 * 1.2)
    assert timeline.peak_slots == 1


def test_early_state_comes_before_zero_and_flushes_run_into_the_next_forward() -> None:
    # Of 6 s of prefetches 3.6 s are early; flushes take 6 s from 0 on, of which 3 s are hidden.
    window = Window(10_000, 10_000, backward_s=3.6, forward_s=3.0)
    timeline = simulate(streaming(5, early=4), equal(5), FREE, Widths(), window)
    assert timeline.operations[0].start == pytest.approx(-3.6)
    assert timeline.update_s == pytest.approx(2.4)
    assert timeline.end_s == pytest.approx(6.0)
    assert timeline.exposed_s == pytest.approx(3.0)


def test_late_state_uses_buffers_of_early_state_as_soon_as_they_are_empty() -> None:
    # With the ring of 3 alone, the eighth prefetch would wait for all six flushes before it.
    window = Window(10_000, 10_000, backward_s=7.2, forward_s=100.0)
    timeline = simulate(streaming(12, early=6), equal(12), FREE, Widths(), window)
    # One flush behind at first, then at full rate.
    assert timeline.update_s == pytest.approx(1.2 + 6 * 1.2)


def test_gradients_sent_early_are_there_when_the_cpu_begins() -> None:
    window = Window(backward_s=10.0)
    late = simulate(on_cpu(4), equal(4), FREE, Widths(), window)
    early = simulate(on_cpu(4, early_gradients=True), equal(4), FREE, Widths(), window)
    # 40 bytes of gradient first, 1 s of update each, 20 bytes of weights last.
    assert late.update_s == pytest.approx(0.4 + 4 + 0.2)
    assert early.update_s == pytest.approx(4 + 0.2)
    downs = [t for t in early.operations if t.operation.kind is Kind.GRADIENT_DOWN]
    # The last subgroup's gradient is final first.
    assert [(t.operation.subgroup, t.start) for t in downs] == [(3, -7.5), (2, -5.0), (1, -2.5), (0, 0.0)]


def test_host_weights_move_nothing_for_the_cpu() -> None:
    timeline = simulate(on_cpu(4), equal(4), FREE, Widths(), Window(), host_weights=True)
    assert timeline.up_bytes == timeline.down_bytes == 0
    assert timeline.update_s == pytest.approx(4.0)


def test_masters_that_need_the_weight_bring_it_down() -> None:
    timeline = simulate(on_cpu(2), equal(2), FREE, Widths(10, 2, 2, weight_down=True), Window())
    assert timeline.down_bytes == 2 * 10 * (2 + 2)
    assert timeline.up_bytes == 2 * 10 * 2


def test_residents_cost_their_update_alone() -> None:
    plan = Plan((Place.RESIDENT,) * 3, (0, 1, 2), (), 0)
    timeline = simulate(plan, equal(3), replace(FREE, gpu_adam=10), Widths(), Window())
    assert (timeline.exposed_s, timeline.up_bytes, timeline.peak_slots) == (pytest.approx(3.0), 0, 0)


def test_no_subgroups_take_no_time() -> None:
    timeline = simulate(Plan((), (), (), 0), (), FREE, Widths(), Window(1, 1, 1.0, 1.0))
    assert (timeline.update_s, timeline.exposed_s, timeline.operations) == (0.0, 0.0, ())


rates = st.floats(0.5, 100)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, tuple[Subgroup, ...], Constants, Widths, Window]:
    targets = draw(st.lists(st.builds(Target, st.integers(1, 40), st.integers(0, 1)), min_size=1, max_size=6))
    subgroups = cut_subgroups(targets, draw(st.integers(5, 20)))
    places = tuple(draw(st.sampled_from(list(Place))) for _ in subgroups)
    device = tuple(i for i, place in enumerate(places) if place is not Place.CPU)
    cpu = tuple(i for i, place in enumerate(places) if place is Place.CPU)
    h2d, d2h, cpu_adam = draw(rates), draw(rates), draw(rates)
    constants = Constants(
        h2d=h2d,
        d2h=d2h,
        h2d_duplex=h2d * draw(st.floats(0.3, 1)),
        d2h_duplex=d2h * draw(st.floats(0.3, 1)),
        link_with_cpu=draw(st.floats(0.3, 1)),
        cpu_adam=cpu_adam,
        cpu_adam_with_link=cpu_adam * draw(st.floats(0.3, 1)),
        gpu_adam=draw(rates),
        latency=draw(st.sampled_from([0.0, 0.01])),
    )
    window = Window(10**6, 10**6, draw(st.floats(0, 5)), draw(st.floats(0, 5)))
    early = draw(st.integers(0, sum(place is Place.STREAM for place in places)))
    plan = Plan(places, device, cpu, draw(st.integers(1, 4)), early, draw(st.integers(1, 3)), draw(st.booleans()))
    widths = Widths(draw(st.sampled_from([8, 10, 12])), draw(st.sampled_from([2, 4])), 2, draw(st.booleans()))
    return plan, subgroups, constants, widths, window


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_plan_is_faster_than_the_bound(
    case: tuple[Plan, tuple[Subgroup, ...], Constants, Widths, Window],
) -> None:
    plan, subgroups, constants, widths, window = case
    timeline = simulate(plan, subgroups, constants, widths, window)
    held = {place: sum(s.numel for s in subgroups if plan.places[s.index] is place) for place in Place}
    bound = lower_bound(held[Place.STREAM], held[Place.CPU], held[Place.RESIDENT], constants, widths, window)
    assert timeline.exposed_s >= bound * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_operations_honour_queues_waits_and_buffers(
    case: tuple[Plan, tuple[Subgroup, ...], Constants, Widths, Window],
) -> None:
    plan, subgroups, constants, widths, window = case
    timeline = simulate(plan, subgroups, constants, widths, window)
    for timed in timeline.by_queue().values():
        for before, after in pairwise(timed):
            assert after.start >= before.end - 1e-9
    order: Order[int] = Order()
    for number, (operation, start, end) in enumerate(timeline.operations):
        assert end >= start + constants.latency - 1e-9
        for other in order.waits(operation):
            assert start >= timeline.operations[other].end - 1e-9
        order.issued(operation, number)
    assert timeline.peak_slots <= max(plan.num_slots, plan.num_early)
    assert timeline.update_s <= timeline.exposed_s <= timeline.end_s + 1e-9
    updates = [t for t in timeline.operations if t.operation.kind in (Kind.CPU_UPDATE, Kind.DEVICE_UPDATE)]
    assert all(t.start >= 0 for t in updates)


@settings(max_examples=50, deadline=None)
@given(cases(), st.floats(0.1, 10))
def test_times_scale_with_the_unit_of_time(
    case: tuple[Plan, tuple[Subgroup, ...], Constants, Widths, Window], unit: float
) -> None:
    plan, subgroups, constants, widths, window = case
    slower = Constants(
        *(value * unit for value in (constants.h2d, constants.d2h, constants.h2d_duplex, constants.d2h_duplex)),
        link_with_cpu=constants.link_with_cpu,
        cpu_adam=constants.cpu_adam * unit,
        cpu_adam_with_link=constants.cpu_adam_with_link * unit,
        gpu_adam=constants.gpu_adam * unit,
        latency=constants.latency / unit,
    )
    other = replace(window, backward_s=window.backward_s / unit, forward_s=window.forward_s / unit)
    here = simulate(plan, subgroups, constants, widths, window)
    there = simulate(plan, subgroups, slower, widths, other)
    assert there.exposed_s * unit == pytest.approx(here.exposed_s, rel=1e-6)
