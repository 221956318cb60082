"""Plans against everything that could be planned, the closed form, and what fits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim.offload.bounds import balanced_fraction
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.plan import Planned, make_plan
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.simulate import simulate
from pretrain.optim.offload.sizes import device_parts, host_parts
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups

MACHINE = Constants(
    h2d=52e9,
    d2h=50e9,
    h2d_duplex=48e9,
    d2h_duplex=45e9,
    link_with_cpu=0.9,
    cpu_adam=2e9,
    cpu_adam_with_link=1.5e9,
    gpu_adam=160e9,
)
WIDTHS = Widths(12, 2, 2)
SIZE = 100_000_000
THREE_SLOTS = Window(device_bytes=3 * 12 * SIZE)


def subgroups_of(*sizes: int) -> tuple[Subgroup, ...]:
    """Subgroups of exactly these sizes."""
    return tuple(replace(cut_subgroups([Target(size, 0)], size)[0], index=i) for i, size in enumerate(sizes))


def equal(count: int, tail: int = 0) -> tuple[Subgroup, ...]:
    return cut_subgroups([Target(count * SIZE + tail, 0)], SIZE)


def every_plan(count: int, *, early: bool = False) -> Iterator[Plan]:
    """Every place (CPU or streamed) and every order, with three slots."""
    for streamed in range(count + 1):
        for chosen in combinations(range(count), streamed):
            places = tuple(Place.STREAM if i in chosen else Place.CPU for i in range(count))
            rest = [i for i in range(count) if i not in chosen]
            for device in permutations(chosen):
                for cpu in permutations(rest):
                    yield Plan(places, device, cpu, min(3, streamed), 0, max(1, min(3, len(rest))), early)


def random_constants(pick: random.Random) -> Constants:
    h2d, cpu = pick.uniform(20e9, 60e9), pick.uniform(0.5e9, 8e9)
    d2h = h2d * pick.uniform(0.7, 1.1)
    return Constants(
        h2d=h2d,
        d2h=d2h,
        h2d_duplex=h2d * pick.uniform(0.6, 1),
        d2h_duplex=d2h * pick.uniform(0.6, 1),
        link_with_cpu=pick.uniform(0.6, 1),
        cpu_adam=cpu,
        cpu_adam_with_link=cpu * pick.uniform(0.5, 1),
        gpu_adam=pick.uniform(50e9, 200e9),
    )


def plan_for(subgroups: tuple[Subgroup, ...], constants: Constants = MACHINE, window: Window = THREE_SLOTS) -> Planned:
    return make_plan(subgroups, constants, WIDTHS, window, resident_fraction=0.0, overlap=False)


def check_whole(planned: Planned, subgroups: tuple[Subgroup, ...], window: Window) -> None:
    """Everything is updated once, at its place, in memory that is there."""
    plan = planned.plan
    assert sorted((*plan.device_order, *plan.cpu_order)) == list(range(len(subgroups)))
    assert all(plan.places[i] is Place.CPU for i in plan.cpu_order)
    assert not any(plan.places[i] is Place.CPU for i in plan.device_order)
    parts = device_parts(plan, subgroups, WIDTHS)
    assert parts["resident state"] + parts["buffers"] <= window.device_bytes
    assert sum(parts.values()) <= window.device_bytes + window.early_bytes
    assert plan.num_early <= len(plan.streamed)
    assert not plan.streamed or plan.num_slots >= 1
    assert planned.timeline.peak_slots <= max(plan.num_slots, plan.num_early)


@pytest.mark.parametrize("seed", range(25))
def test_within_one_percent_of_every_place_and_order_of_ragged_sizes(seed: int) -> None:
    pick = random.Random(seed)
    count = 6 if seed == 0 else pick.randint(1, 5)
    sizes = [pick.choice([SIZE, SIZE, pick.randint(SIZE // 20, SIZE)]) for _ in range(count)]
    subgroups, constants = subgroups_of(*sizes), random_constants(pick)
    best = min(simulate(plan, subgroups, constants, WIDTHS, Window()).exposed_s for plan in every_plan(count))
    assert plan_for(subgroups, constants).timeline.exposed_s <= best * 1.01


@pytest.mark.parametrize("seed", range(8))
def test_within_one_percent_of_every_place_and_order_with_overlap(seed: int) -> None:
    pick = random.Random(100 + seed)
    count = pick.randint(2, 4)
    sizes = [pick.choice([SIZE, pick.randint(SIZE // 20, SIZE)]) for _ in range(count)]
    subgroups, constants = subgroups_of(*sizes), random_constants(pick)
    window = Window(3 * 12 * SIZE, 0, pick.uniform(0, 0.04), pick.uniform(0, 0.04))
    best = min(
        simulate(replace(plan, num_early=early), subgroups, constants, WIDTHS, window).exposed_s
        for plan in every_plan(count, early=True)
        for early in range(min(3, len(plan.streamed)) + 1)
    )
    planned = make_plan(subgroups, constants, WIDTHS, window, resident_fraction=0.0)
    assert planned.timeline.exposed_s <= best * 1.01


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_all_counts_of_equal_subgroups(seed: int) -> None:
    pick = random.Random(seed)
    subgroups, constants = equal(pick.randint(3, 12)), random_constants(pick)
    count = len(subgroups)
    times = []
    for streamed in range(count + 1):
        places = (Place.STREAM,) * streamed + (Place.CPU,) * (count - streamed)
        plan = Plan(places, tuple(range(streamed)), tuple(range(streamed, count)), min(3, streamed))
        times.append(simulate(plan, subgroups, constants, WIDTHS, Window()).exposed_s)
    # Orders of equal subgroups are equal.
    assert plan_for(subgroups, constants).timeline.exposed_s == pytest.approx(min(times), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("overlap", [False, True])
def test_coarse_to_fine_finds_what_a_scan_of_all_fractions_finds(seed: int, overlap: bool) -> None:
    pick = random.Random(seed)
    subgroups, constants = equal(pick.randint(40, 90)), random_constants(pick)
    window = Window(3 * 12 * SIZE, pick.randint(0, 20) * 12 * SIZE, pick.uniform(0, 1), pick.uniform(0, 1))
    found = make_plan(subgroups, constants, WIDTHS, window, resident_fraction=0.0, overlap=overlap)
    scanned = min(
        make_plan(
            subgroups, constants, WIDTHS, window, fraction=k / len(subgroups), resident_fraction=0.0, overlap=overlap
        ).timeline.exposed_s
        for k in range(len(subgroups) + 1)
    )
    assert found.timeline.exposed_s <= scanned * 1.002


@pytest.mark.parametrize("seed", [1, 4, 20, 27, 29, *range(100, 104)])
def test_no_share_that_could_be_told_is_better(seed: int) -> None:
    pick = random.Random(seed)
    count = pick.randint(8, 40)
    subgroups, constants = equal(count), random_constants(pick)
    room = pick.choice([3, 4, 6, 12]) * 12 * SIZE
    window = Window(room, pick.randint(0, 12) * 12 * SIZE, pick.uniform(0, 0.5), pick.uniform(0, 0.5))
    found = make_plan(subgroups, constants, WIDTHS, window, resident_fraction=0.0).timeline.exposed_s
    for streamed in range(0, count + 1, max(1, count // 8)):
        told = make_plan(subgroups, constants, WIDTHS, window, fraction=streamed / count, resident_fraction=0.0)
        assert found <= told.timeline.exposed_s * 1.01


@pytest.mark.parametrize("seed", range(4))
def test_no_resident_share_that_could_be_told_is_better(seed: int) -> None:
    pick = random.Random(seed)
    subgroups, constants = equal(pick.randint(8, 24), pick.randint(0, SIZE)), random_constants(pick)
    room = pick.randint(3, 12)
    window = Window(room * 12 * SIZE, pick.randint(0, 12) * 12 * SIZE, pick.uniform(0, 0.3), pick.uniform(0, 0.3))
    found = make_plan(subgroups, constants, WIDTHS, window).timeline.exposed_s
    for kept in range(0, min(room, len(subgroups)) + 1, 2):
        told = make_plan(
            subgroups,
            constants,
            WIDTHS,
            window,
            resident_fraction=min(kept / len(subgroups), room / (len(subgroups) + 1)),
        )
        assert found <= told.timeline.exposed_s * 1.01


@pytest.mark.parametrize("seed", range(12))
def test_overlap_is_never_slower(seed: int) -> None:
    pick = random.Random(seed)
    subgroups, constants = equal(pick.randint(3, 24), pick.randint(1, SIZE)), random_constants(pick)
    widths = Widths(10, 4, 2, weight_down=True)
    early, backward = (0, 0.0) if seed % 2 else (pick.randint(0, 10) * 10 * SIZE, pick.uniform(0, 0.5))
    window = Window(3 * 10 * SIZE, early, backward, pick.choice([0, pick.uniform(0, 0.5)]))
    seconds = [
        make_plan(subgroups, constants, widths, window, resident_fraction=0.0, overlap=overlap).timeline.exposed_s
        for overlap in (True, False)
    ]
    assert seconds[0] <= seconds[1] * (1 + 1e-9)


def test_the_closed_form_comes_out_of_equal_rates() -> None:
    # Gradients and weights cost nothing on the link, and nothing contends: f* = t_c / (t_c + t_g).
    for cpu in (1e9, 2e9, 3e9, 6e9):
        constants = Constants(52e9, 52e9, 52e9, 52e9, 1.0, cpu, cpu, 1e15, 0.0)
        widths = Widths(state=12, gradient=0, weight=0)
        planned = make_plan(equal(200), constants, widths, THREE_SLOTS, resident_fraction=0.0, overlap=False)
        t_c, t_g = 1 / cpu, 12 / 52e9
        assert balanced_fraction(constants, widths) == pytest.approx(t_c / (t_c + t_g))
        assert planned.fraction == pytest.approx(t_c / (t_c + t_g), abs=2 / 200)
        # T = P t_c t_g / (t_c + t_g), and the pipeline's first and last transfer.
        expected = 200 * SIZE * t_c * t_g / (t_c + t_g)
        assert expected <= planned.timeline.exposed_s <= expected + 2 * SIZE * t_g


def test_fractions_above_one_half_and_below_come_as_they_are_best() -> None:
    shares = [
        plan_for(equal(60), replace(MACHINE, cpu_adam=u, cpu_adam_with_link=u)).fraction for u in (0.5e9, 2e9, 5e9)
    ]
    assert shares[0] > 0.8 > shares[1] > 0.5 > shares[2] > 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(Target, st.integers(1, 5 * SIZE), st.integers(0, 2)), min_size=1, max_size=5),
    st.integers(SIZE // 3, SIZE),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.floats(0, 1)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_plan_is_whole_and_fits(
    targets: list[Target], size: int, fraction: float | None, resident: float | None, overlap: bool, seed: int
) -> None:
    pick = random.Random(seed)
    subgroups = cut_subgroups(targets, size)
    memory = pick.randint(3 * 12 * SIZE, 20 * 12 * SIZE)
    window = Window(memory, pick.randint(0, memory), pick.uniform(0, 0.3), pick.uniform(0, 0.3))
    state = 12 * sum(subgroup.numel for subgroup in subgroups)
    if resident is not None and resident * state > memory - 4 * 12 * SIZE:
        resident = 0.0
    planned = make_plan(
        subgroups,
        random_constants(pick),
        WIDTHS,
        window,
        fraction=fraction,
        resident_fraction=resident,
        overlap=overlap,
    )
    check_whole(planned, subgroups, window)
    if not overlap:
        assert planned.plan.num_early == 0
        assert not planned.plan.early_gradients


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7), st.floats(0, 1))
def test_a_given_fraction_is_the_nearest_that_whole_subgroups_make(sizes: list[int], fraction: float) -> None:
    subgroups = subgroups_of(*sizes)
    planned = make_plan(subgroups, MACHINE, WIDTHS, THREE_SLOTS, fraction=fraction, resident_fraction=0.0)
    total = sum(sizes)
    nearest = min(
        abs(sum(chosen) / total - fraction) for k in range(len(sizes) + 1) for chosen in combinations(sizes, k)
    )
    # More than four odd sizes are exchanged one by one: near, and mostly the nearest.
    slack = 0.0 if len(set(sizes)) <= 4 and len(sizes) - max(map(sizes.count, sizes)) <= 4 else max(sizes) / total / 2
    assert abs(planned.fraction - fraction) <= nearest + slack + 1e-9


@pytest.mark.parametrize("numerator", range(24))
def test_any_share_not_only_strides(numerator: int) -> None:
    planned = make_plan(
        equal(23), MACHINE, WIDTHS, THREE_SLOTS, fraction=numerator / 23, resident_fraction=0.0, overlap=False
    )
    assert len(planned.plan.streamed) == numerator
    assert any(f"nearest to {numerator / 23:g}" in line for line in planned.why)


def test_three_slots_where_they_fit_and_the_numbers_where_they_do_not() -> None:
    subgroups = equal(20)
    assert plan_for(subgroups).plan.num_slots == 3
    few = plan_for(subgroups, window=Window(device_bytes=2 * 12 * SIZE + 5))
    assert few.plan.num_slots == 2
    assert any("fewer than 3 buffers" in line for line in few.why)
    assert any("2.24 of 2.24 GiB" in line for line in few.why)
    # With less overlap of both directions less is streamed, and the step is longer.
    assert few.timeline.exposed_s > plan_for(subgroups).timeline.exposed_s
    none = plan_for(subgroups, window=Window(device_bytes=12 * SIZE - 1))
    assert none.fraction == 0


def test_more_slots_only_where_they_shorten_the_step() -> None:
    subgroups = equal(20)
    assert plan_for(subgroups, window=Window(device_bytes=100 * 12 * SIZE)).plan.num_slots == 3
    # State comes three times as fast as it leaves, and what leaves late is hidden by the next forward pass.
    slow_down = replace(MACHINE, d2h=17e9, d2h_duplex=15e9)
    times = []
    for slots in (3, 100):
        window = Window(device_bytes=slots * 12 * SIZE, forward_s=10.0)
        planned = make_plan(subgroups, slow_down, WIDTHS, window, resident_fraction=0.0)
        assert planned.plan.num_slots == 3 if slots == 3 else 3 < planned.plan.num_slots <= 8
        times.append(planned.timeline.exposed_s)
    assert times[1] < 0.97 * times[0]


def test_memory_of_the_device_is_filled_with_residents() -> None:
    subgroups = equal(20)
    window = Window(device_bytes=13 * 12 * SIZE)
    planned = make_plan(subgroups, MACHINE, WIDTHS, window, overlap=False)
    assert planned.resident_fraction >= 10 / 20
    assert planned.timeline.exposed_s < 0.55 * plan_for(subgroups).timeline.exposed_s
    everything = make_plan(subgroups, MACHINE, WIDTHS, Window(device_bytes=20 * 12 * SIZE), overlap=False)
    assert everything.resident_fraction == 1
    assert everything.timeline.up_bytes == 0


def test_residents_by_size_fill_what_is_left() -> None:
    sizes = [SIZE, SIZE // 2, SIZE // 4, SIZE // 8]
    planned = make_plan(
        subgroups_of(*sizes), MACHINE, WIDTHS, Window(device_bytes=12 * (SIZE + SIZE // 4)), fraction=0.0, overlap=False
    )
    assert planned.plan.places == (Place.RESIDENT, Place.CPU, Place.RESIDENT, Place.CPU)


def test_overlap_brings_as_much_early_as_time_and_memory_allow() -> None:
    subgroups = equal(60)
    window = Window(device_bytes=3 * 12 * SIZE, early_bytes=8 * 12 * SIZE, backward_s=10.0, forward_s=10.0)
    by_memory = make_plan(subgroups, MACHINE, WIDTHS, window, resident_fraction=0.0)
    assert by_memory.plan.num_early == 11
    # 52 GB/s bring 1.2 GB in 23 ms: four and a part, and two that are under way when the first buffer is free.
    by_time = make_plan(subgroups, MACHINE, WIDTHS, replace(window, backward_s=0.1), resident_fraction=0.0)
    assert by_time.plan.num_early == 7
    without = make_plan(subgroups, MACHINE, WIDTHS, window, resident_fraction=0.0, overlap=False)
    times = [p.timeline.exposed_s for p in (by_memory, by_time, without)]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]


def test_long_passes_hide_all_transfers() -> None:
    window = Window(device_bytes=3 * 12 * SIZE, early_bytes=80 * 12 * SIZE, backward_s=3.0, forward_s=3.0)
    planned = make_plan(equal(60), MACHINE, WIDTHS, window, resident_fraction=0.0)
    assert planned.fraction > 0.95
    assert planned.timeline.exposed_s < 0.06


def test_gradients_wait_for_the_end_of_the_backward_pass_where_the_host_has_no_room_for_them() -> None:
    subgroups = equal(20)
    window = Window(3 * 12 * SIZE, 0, 0.5, 0.5)
    roomy = make_plan(subgroups, MACHINE, WIDTHS, window, fraction=0.5, resident_fraction=0.0)
    assert roomy.plan.early_gradients
    # State, and three buffers of gradients and weights.
    limit = 20 * 12 * SIZE + 3 * 4 * SIZE
    tight = make_plan(
        subgroups, MACHINE, WIDTHS, replace(window, host_bytes=limit), fraction=0.5, resident_fraction=0.0
    )
    assert not tight.plan.early_gradients
    assert any(f"host_bytes {limit} hold no more" in line for line in tight.why)
    assert sum(host_parts(tight.plan, subgroups, WIDTHS).values()) <= limit
    with pytest.raises(ValueError, match=rf"needs 2520+ bytes of host memory .* host_bytes is {limit - 1}"):
        make_plan(
            subgroups, MACHINE, WIDTHS, replace(window, host_bytes=limit - 1), fraction=0.5, resident_fraction=0.0
        )


def test_residents_that_the_host_has_no_room_for_come_before_speed() -> None:
    # A slow CPU makes streaming faster, but its buffers take the place of a resident subgroup.
    subgroups = equal(6)
    slow = replace(MACHINE, cpu_adam=1e8, cpu_adam_with_link=1e8)
    window = Window(device_bytes=4 * 12 * SIZE)
    fast = make_plan(subgroups, slow, WIDTHS, window, overlap=False)
    assert 0 < fast.resident_fraction < 4 / 6
    limit = 2 * 12 * SIZE + 2 * 4 * SIZE
    tight = make_plan(subgroups, slow, WIDTHS, replace(window, host_bytes=limit), overlap=False)
    assert tight.resident_fraction == pytest.approx(4 / 6)
    assert tight.timeline.exposed_s > fast.timeline.exposed_s


def test_memory_that_does_not_hold_what_was_asked_for_is_told_with_the_numbers() -> None:
    subgroups = equal(20)
    with pytest.raises(
        ValueError, match=r"resident_fraction 0.5 keeps 12000000000 bytes .* device_bytes is 3600000000"
    ):
        make_plan(subgroups, MACHINE, WIDTHS, THREE_SLOTS, resident_fraction=0.5)
    with pytest.raises(ValueError, match=r"one buffer takes 1200000000 bytes .* but 5 of device_bytes 5 are left"):
        make_plan(subgroups, MACHINE, WIDTHS, Window(device_bytes=5), fraction=0.5, resident_fraction=0.0)
    with pytest.raises(ValueError, match=r"fraction is 1\.5, expected a share from 0 to 1"):
        make_plan(subgroups, MACHINE, WIDTHS, THREE_SLOTS, fraction=1.5)


def test_a_thousand_subgroups_take_few_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0  # subgroups simulated

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += len(args[1])  # type: ignore[arg-type]
        return simulate(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("pretrain.optim.offload.search.simulate", counted)
    planned = plan_for(equal(1000, SIZE // 3))
    assert calls <= 24 * 1000
    # Both sides are through at the same time.
    last = [max(t.end for t in timed) for timed in planned.timeline.by_queue().values()]
    assert min(last) > 0.99 * planned.timeline.exposed_s


def test_host_weights_leave_the_link_to_streamed_state() -> None:
    planned = make_plan(equal(8), MACHINE, WIDTHS, THREE_SLOTS, resident_fraction=0.0, host_weights=True)
    assert not planned.plan.early_gradients
    assert planned.timeline.up_bytes == 12 * SIZE * len(planned.plan.streamed)


def test_nothing_to_update() -> None:
    planned = make_plan((), MACHINE, WIDTHS, THREE_SLOTS)
    assert planned.plan.places == ()
    assert planned.timeline.exposed_s == 0
