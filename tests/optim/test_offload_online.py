"""The online model on a device with a clock of its own: constants converge, drift plans anew, values never change."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threaded_device import ThreadDevice

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload import online
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.device import Event, InlineDevice, OperationTime
from pretrain.optim.offload.device_memory import Envelope, Room
from pretrain.optim.offload.drift import constants_drift, window_drift
from pretrain.optim.offload.estimate import Estimate
from pretrain.optim.offload.online import Online, shape_widths
from pretrain.optim.offload.plan import make_plan
from pretrain.optim.offload.schedule import Kind, Operation, Place, Plan
from pretrain.optim.offload.simulate import simulate
from pretrain.optim.offload.states import SLOTS, GroupSettings, OffloadedStates
from pretrain.optim.offload.subgroups import Target, cut_subgroups
from pretrain.parallel import peak_memory
from pretrain.training.offload_callback import OffloadCallback
from pretrain.training.state import StepRecord

TRUTH = Constants(50e9, 48e9, 44e9, 43e9, 0.85, 2.2e9, 1.7e9, 8e10, 0.0)
ROOM = Window(device_bytes=10**6)
SETTINGS = [GroupSettings(1e-2, (0.9, 0.95), 1e-8, 0.1)]
SIZE, SUBGROUP = 1_000, 100


class _Mark:
    def __init__(self, time: float) -> None:
        self.time = time


class ClockedDevice(InlineDevice):
    """Does everything at once, but tells the times that the simulator gives for ``truth``. Nothing waits.

    ``late``: what is asked for is over only once the next step has begun, as on a device that the host runs ahead of.
    """

    host_weights = False

    def __init__(self, truth: Constants, *, backward_s: float = 0.0, late: bool = False) -> None:
        super().__init__()
        self.truth = truth
        self.backward_s = backward_s
        self.late = late
        self.now = 0.0
        self.seen = 0.0
        self.plan: Callable[[], Plan] | None = None
        self.widths = WIDTHS
        self._given: list[Operation] = []
        self._told: list[OperationTime] = []

    def run(self, operation: Any, waits: Any, work: Callable[[], None]) -> Event:
        self._given.append(operation)
        return super().run(operation, waits, work)

    def mark(self) -> Event:
        return _Mark(self.now)

    def hold(self, events: Any) -> None:
        if not list(events) or self.plan is None:
            return
        window = Window(backward_s=self.backward_s)
        found = simulate(self.plan(), cut_subgroups([Target(SIZE, 0)], SUBGROUP), self.truth, self.widths, window)
        by_key = {(t.operation.kind, t.operation.subgroup): t for t in found.operations}
        for operation in self._given:
            timed = by_key[operation.kind, operation.subgroup]
            self._told.append(OperationTime(operation, self.now + timed.start, self.now + timed.end))
        self._given = []
        self.now += found.update_s

    def collect(self) -> list[OperationTime]:
        over = [t for t in self._told if t.end <= self._visible]
        self._told = [t for t in self._told if t.end > self._visible]
        return over

    def time(self, event: Any) -> float | None:
        return event.time if event.time <= self._visible else None

    @property
    def _visible(self) -> float:
        return self.seen if self.late else math.inf


WIDTHS = Widths(state=12, gradient=4, weight=2)


class Run:
    """A small training on a :class:`ClockedDevice`. One forward and one backward pass take ``pass_s`` each."""

    def __init__(self, device: ClockedDevice, plan: Plan, config: OffloadConfig, *, watch: bool = True, **online: Any):
        generator = torch.Generator().manual_seed(3)
        self.device = device
        self.weight = torch.randn(SIZE, generator=generator).to(torch.bfloat16)
        self._generator = generator
        self.states = OffloadedStates(
            [self.weight], [0], config, gradient_dtype=torch.float32, device=device, plan=plan
        )
        device.plan, device.widths = lambda: self.states.plan, shape_widths(self.states.shape)
        self.journal: list[dict[str, Any]] = []
        self.online: Online | None = None
        if watch:
            self.online = Online(self.states, journal=self.journal.append, **{"constants": TRUTH, **online})
            self.states.watcher = self.online
        self._steps = 0

    def step(self, count: int = 1, *, early: bool = True) -> None:
        for _ in range(count):
            self._steps += 1
            self.device.now += self.device.backward_s  # the forward pass, as long
            gradient = torch.randn(SIZE, generator=self._generator)
            if early:
                self.states.start_early()
            self.device.seen = self.device.now
            self.device.now += self.device.backward_s
            self.states.update([gradient], SETTINGS, self._steps)

    def values(self) -> list[torch.Tensor]:
        return [self.weight.clone(), *(self.states.read(0, slot) for slot in SLOTS)]


def _config(**changes: Any) -> OffloadConfig:
    return dataclasses.replace(OffloadConfig(enabled=True, subgroup_size=SUBGROUP), **changes)


def _plan(constants: Constants = TRUTH, window: Window = ROOM, **asked: Any) -> Plan:
    return make_plan(
        cut_subgroups([Target(SIZE, 0)], SUBGROUP), constants, WIDTHS, window, resident_fraction=0.0, **asked
    ).plan


# --- estimates


@settings(max_examples=25, deadline=None)
@given(
    factors=st.tuples(*[st.floats(0.3, 3.0)] * 4),
    fraction=st.sampled_from([0.3, 0.5, 0.7]),
    overlap=st.booleans(),
)
def test_predictions_converge_to_what_is_measured(
    factors: tuple[float, float, float, float], fraction: float, overlap: bool
) -> None:
    up, down, cpu, device = factors
    truth = dataclasses.replace(
        TRUTH,
        h2d=TRUTH.h2d * up,
        h2d_duplex=TRUTH.h2d_duplex * up,
        d2h=TRUTH.d2h * down,
        d2h_duplex=TRUTH.d2h_duplex * down,
        cpu_adam=TRUTH.cpu_adam * cpu,
        cpu_adam_with_link=TRUTH.cpu_adam_with_link * cpu,
        gpu_adam=TRUTH.gpu_adam * device,
    )
    subgroups = cut_subgroups([Target(SIZE, 0)], SUBGROUP)
    window = Window(device_bytes=10**6, backward_s=2e-8, forward_s=2e-8)
    plan = _plan(window=window, fraction=fraction, overlap=overlap)
    measured = simulate(plan, subgroups, truth, WIDTHS, window)
    estimate = Estimate(TRUTH, subgroups, WIDTHS)
    for _ in range(30):
        estimate.add(measured.operations)
    predicted = simulate(plan, subgroups, estimate.constants, WIDTHS, window)
    assert predicted.update_s == pytest.approx(measured.update_s, rel=1e-3)


def test_estimates_of_what_was_seen_by_itself_are_exact() -> None:
    subgroups = cut_subgroups([Target(SIZE, 0)], SUBGROUP)
    truth = dataclasses.replace(TRUTH, cpu_adam=5e8, d2h=9e9, h2d=7e9)
    # One subgroup: nothing ever runs beside anything else.
    plan = dataclasses.replace(_plan(fraction=0.0), early_gradients=False)
    one = cut_subgroups([Target(SUBGROUP, 0)], SUBGROUP)
    alone = dataclasses.replace(plan, places=plan.places[:1], cpu_order=(0,))
    estimate = Estimate(TRUTH, one, WIDTHS)
    estimate.add(simulate(alone, one, truth, WIDTHS, Window()).operations)
    found = estimate.constants
    assert (found.h2d, found.d2h, found.cpu_adam) == pytest.approx((7e9, 9e9, 5e8))
    # What was not seen goes with what is like it; the device told nothing.
    assert found.h2d_duplex == pytest.approx(TRUTH.h2d_duplex * 7 / 50)
    assert found.link_with_cpu == pytest.approx(TRUTH.link_with_cpu)
    assert found.gpu_adam == TRUTH.gpu_adam
    assert len(subgroups) == 10


def test_one_slow_operation_moves_nothing() -> None:
    subgroups = cut_subgroups([Target(SIZE, 0)], SUBGROUP)
    timeline = simulate(_plan(fraction=0.0), subgroups, TRUTH, WIDTHS, Window())
    updates = [t for t in timeline.operations if t.operation.kind is Kind.CPU_UPDATE]
    last = max(updates, key=lambda t: t.end)
    slow = [t._replace(end=t.start + 50 * (t.end - t.start)) if t is last else t for t in updates]
    found = []
    for operations in (updates, slow):
        estimate = Estimate(TRUTH, subgroups, WIDTHS)
        estimate.add(operations)
        found.append(estimate.constants.cpu_adam)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_operations_that_are_all_latency_tell_nothing() -> None:
    subgroups = cut_subgroups([Target(SIZE, 0)], SUBGROUP)
    slow = dataclasses.replace(TRUTH, latency=1e-3)
    estimate = Estimate(slow, subgroups, WIDTHS)
    estimate.add(simulate(_plan(), subgroups, slow, WIDTHS, Window()).operations)
    assert estimate.constants == slow


# --- plans


def test_drift_plans_anew_and_says_why() -> None:
    slow_link = dataclasses.replace(TRUTH, h2d=5e9, d2h=5e9, h2d_duplex=4.5e9, d2h_duplex=4.5e9)
    device = ClockedDevice(TRUTH)
    plan = _plan()
    run = Run(device, plan, _config(replan_interval=10, overlap=False, resident_fraction=0.0))
    assert run.online is not None
    run.step(20, early=False)
    before = run.online.report()
    assert run.states.plan == plan
    assert run.journal == []
    assert before["offload/replans"] == 0
    assert before["offload/error"] == pytest.approx(0.0, abs=0.02)
    device.truth = slow_link
    run.step(1, early=False)
    run.step(39, early=False)
    after = run.online.report()
    assert after["offload/replans"] >= 1
    assert after["offload/fraction"] < before["offload/fraction"]  # less over a slow link
    changed = [entry for entry in run.journal if entry["changed"]]
    assert any("h2d" in reason for reason in changed[0]["reasons"])
    assert changed[0]["after_s"] < changed[0]["before_s"]
    json.dumps(run.journal)
    # And the new plan is about what would have been made at once.
    best = simulate(_plan(slow_link, overlap=False), run.states.subgroups, slow_link, WIDTHS, Window()).exposed_s
    now = simulate(run.states.plan, run.states.subgroups, slow_link, WIDTHS, Window()).exposed_s
    assert now <= 1.1 * best
    assert abs(after["offload/error"]) < 0.1


def test_without_drift_the_plan_stays() -> None:
    plan = _plan()
    run = Run(ClockedDevice(TRUTH), plan, _config(replan_interval=2, overlap=False, resident_fraction=0.0))
    run.step(30, early=False)
    assert run.states.plan is plan
    assert run.journal == []


@pytest.mark.parametrize(("interval", "changes"), [(0, False), (3, True), (1000, True)])
def test_the_interval_says_how_often_is_looked(interval: int, changes: bool) -> None:
    slow = dataclasses.replace(TRUTH, h2d=5e9, d2h=5e9, h2d_duplex=4.5e9, d2h_duplex=4.5e9)
    run = Run(ClockedDevice(slow), _plan(), _config(replan_interval=interval, overlap=False, resident_fraction=0.0))
    run.step(12, early=False)
    assert bool(run.journal) == changes
    if interval == 1000:  # the early look alone
        assert [entry["step"] for entry in run.journal] == [5]


def test_passes_around_the_update_are_found_and_used() -> None:
    device = ClockedDevice(TRUTH, backward_s=6e-8)
    plan = _plan()
    run = Run(device, plan, _config(replan_interval=5, resident_fraction=0.0))
    assert run.online is not None
    assert plan.num_early == 0
    run.step(15)
    window = run.online.window
    assert (window.backward_s, window.forward_s) == pytest.approx((6e-8, 6e-8))
    assert run.states.plan.num_early > 0
    assert any("backward_s" in reason for entry in run.journal for reason in entry["reasons"])
    run.online.tell_forward(1e-8)  # known better: of one micro-batch
    assert run.online.window.forward_s == 1e-8


@settings(max_examples=10, deadline=None)
@given(link=st.floats(0.1, 10.0), cpu=st.floats(0.1, 10.0), overlap=st.booleans(), low_bits=st.booleans())
def test_planning_anew_changes_no_bit(link: float, cpu: float, overlap: bool, low_bits: bool) -> None:
    config = _config(replan_interval=2, overlap=overlap, master="low_bits" if low_bits else "full")
    prior = dataclasses.replace(
        TRUTH, h2d=link * TRUTH.h2d, h2d_duplex=link * TRUTH.h2d_duplex, cpu_adam=cpu * TRUTH.cpu_adam
    )
    watched = Run(ClockedDevice(TRUTH, backward_s=3e-8), _plan(), config, constants=prior)
    plain = Run(ClockedDevice(TRUTH, backward_s=3e-8), _plan(fraction=0.0), config, watch=False)
    for run in (watched, plain):
        run.step(8)
    for one, other in zip(watched.values(), plain.values(), strict=True):
        assert torch.equal(one, other)


def test_the_bits_were_those_of_several_plans() -> None:
    slow = dataclasses.replace(TRUTH, h2d=5e9, d2h=5e9, h2d_duplex=4.5e9, d2h_duplex=4.5e9)
    run = Run(ClockedDevice(slow), _plan(), _config(replan_interval=2, overlap=False, resident_fraction=0.0))
    run.step(8, early=False)
    assert run.online is not None
    assert run.online.replans > 0


def test_no_room_for_what_is_asked_keeps_the_plan() -> None:
    room = iter([Room(usable=0, peak=0)] * 1000)
    run = Run(
        ClockedDevice(dataclasses.replace(TRUTH, h2d=5e9)), _plan(fraction=0.5),
        _config(replan_interval=3, fraction=0.5, resident_fraction=0.0), memory=lambda: next(room),
    )  # fmt: skip
    plan = run.states.plan
    run.step(6)
    assert run.states.plan is plan
    assert "device_bytes" in run.journal[0]["error"]
    assert run.journal[0]["changed"] is False


# --- a device that the host runs ahead of


def test_times_that_come_late_are_those_of_their_step() -> None:
    config = _config(replan_interval=0, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7, late=True), _plan(), config)
    assert run.online is not None
    run.step(1)
    assert run.online.last is None
    assert "offload/update_s" not in run.online.report()
    run.step(5)
    assert run.online.last is not None
    number, measured, _ = run.online.last
    assert number == 5
    expected = simulate(run.states.plan, run.states.subgroups, TRUTH, WIDTHS, Window(backward_s=1e-7))
    assert measured.update_s == pytest.approx(expected.update_s)
    got = {(t.operation.kind, t.operation.subgroup): (t.start, t.end) for t in measured.operations}
    want = {(t.operation.kind, t.operation.subgroup): (t.start, t.end) for t in expected.operations}
    assert got.keys() == want.keys()
    assert all(got[key] == pytest.approx(want[key], abs=1e-12) for key in want)


def test_what_was_brought_for_a_dropped_step_is_not_counted_twice() -> None:
    config = _config(replan_interval=0, resident_fraction=0.0)
    plan = dataclasses.replace(_plan(), num_early=2)
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7), plan, config)
    assert run.online is not None
    run.step(2)
    run.states.start_early()
    run.states.discard()
    run.step(1)
    assert run.online.last is not None
    number, measured, _ = run.online.last
    assert number == 3
    keys = [(t.operation.kind, t.operation.subgroup) for t in measured.operations]
    assert len(keys) == len(set(keys))


# --- memory


def test_what_the_last_backward_pass_sets_free_is_told_apart() -> None:
    envelope = Envelope()
    assert not envelope.is_known
    # 100 in all; the model takes 60 at most and 30 late; buffers of 10 are always there, 5 more in the backward pass.
    envelope.add_before_early(Room(100, 70), own=10)
    envelope.add_before_update(Room(100, 45), own=15)
    assert (envelope.device_bytes, envelope.early_bytes) == (40, 30)
    envelope.add_before_early(Room(100, 75), own=10)
    envelope.add_before_update(Room(100, 40), own=15)
    assert (envelope.device_bytes, envelope.early_bytes) == (35, 35 - 0)
    # Without a word of the backward pass nothing is known to become free.
    alone = Envelope()
    alone.add_before_update(Room(100, 70), own=10)
    assert (alone.device_bytes, alone.early_bytes) == (40, 0)


def test_a_model_that_needs_more_takes_memory_back() -> None:
    usable = 4 * 1200 + 1000  # three buffers and a little
    peaks = [1000 + 3600]

    def memory() -> Room:
        return Room(usable, peaks[0])

    config = _config(replan_interval=4, overlap=False, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH), _plan(window=Window(device_bytes=3600)), config, memory=memory)
    run.step(8, early=False)
    assert run.states.plan.num_slots == 3
    peaks[0] = 2600 + 3600
    run.step(60, early=False)
    assert run.states.device_bytes <= usable - 2600


def test_the_highest_peak_outlives_looks_at_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [50]
    monkeypatch.setattr(peak_memory, "_highest", {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.__setitem__(0, 10))
    device = torch.device("cuda", 0)
    assert peak_memory.lap_peak_bytes(device) == 50
    assert peak_memory.lap_peak_bytes(device) == 10  # since the look before
    assert peak_memory.peak_bytes(device) == 50  # of the whole run
    peaks[0] = 70
    assert peak_memory.peak_bytes(device) == 70


# --- the plan to begin with

STATE = 12 * SUBGROUP


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free device memory; constants are :data:`TRUTH`."""
    monkeypatch.setattr(online, "probed", lambda device, threads: TRUTH)
    return lambda num_bytes: monkeypatch.setattr(online, "free_device_bytes", lambda device: num_bytes)


def _first(**changes: Any) -> tuple[Plan, OffloadedStates]:
    weight = torch.ones(SIZE, dtype=torch.bfloat16)
    states = OffloadedStates(
        [weight], [0], _config(**changes), gradient_dtype=torch.float32, device=ClockedDevice(TRUTH)
    )
    return states.plan, states


def test_the_first_plan_takes_a_quarter_of_what_is_free_for_buffers(free: Callable[[int], None]) -> None:
    free(100 * STATE)
    plan, _ = _first(resident_fraction="auto")
    assert plan.num_slots == 3
    assert plan.num_early == 0  # how long the passes are is not known
    assert Place.RESIDENT not in plan.places  # nor what the model will need
    free(4 * STATE)
    assert _first()[0].num_slots == 1
    free(3 * STATE)
    assert not _first()[0].streamed


def test_the_first_plan_does_as_it_is_told(free: Callable[[int], None]) -> None:
    free(4 * STATE)
    plan, states = _first(fraction=0.5, resident_fraction=0.1)
    assert len(plan.streamed) in (4, 5)
    assert sum(place is Place.RESIDENT for place in plan.places) == 1
    assert states.device_bytes == 4 * STATE
    free(2 * STATE)
    with pytest.raises(ValueError, match="lower resident_fraction"):
        _first(fraction=0.5, resident_fraction=0.3)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "16", "SLURM_NNODES": "3"}, 6),
        ({"LOCAL_WORLD_SIZE": "64"}, 16),  # a shell's own variables, for another job
        ({}, 16),
    ],
)
def test_ranks_share_the_host(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(online, "world_size", lambda: 16)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert online.ranks_on_host() == expected


# --- threads in place of streams


def test_steps_on_queues_that_run_side_by_side_are_put_together() -> None:
    weight = torch.ones(SIZE, dtype=torch.bfloat16)
    plan = dataclasses.replace(_plan(fraction=0.5), num_early=2)
    with ThreadDevice(0) as device:
        config = _config(replan_interval=0, fraction=0.5)
        states = OffloadedStates([weight], [0], config, gradient_dtype=torch.float32, device=device, plan=plan)
        watcher = Online(states, constants=TRUTH)
        states.watcher = watcher
        for step in range(1, 6):
            states.start_early()
            states.update([torch.ones(SIZE)], SETTINGS, step)
        watcher.close()
        assert watcher.last is not None
        number, measured, predicted = watcher.last
    assert number == 5
    keys = {(t.operation.kind, t.operation.subgroup) for t in measured.operations}
    assert keys == {(t.operation.kind, t.operation.subgroup) for t in predicted.operations}
    assert all(t.start <= t.end for t in measured.operations)
    new = max(t.end for t in measured.operations if t.operation.kind is not Kind.FLUSH)
    assert measured.update_s >= new > 0


# --- drift in words


def test_drift_is_told_by_name_from_a_tenth_on() -> None:
    assert constants_drift(TRUTH, dataclasses.replace(TRUTH, d2h=TRUTH.d2h * 1.09)) == []
    (line,) = constants_drift(TRUTH, dataclasses.replace(TRUTH, d2h=TRUTH.d2h * 0.5))
    assert line.startswith("d2h 2.4e+10, was 4.8e+10 (-50%)")


def test_passes_drift_only_where_they_matter_to_the_update() -> None:
    before = Window(device_bytes=100, backward_s=1.0)
    assert window_drift(before, before, update_s=1.0, unit_bytes=10) == []
    assert window_drift(before, dataclasses.replace(before, backward_s=1.2), update_s=1.0, unit_bytes=10) == []
    assert window_drift(before, dataclasses.replace(before, backward_s=0.5), update_s=1.0, unit_bytes=10)
    assert window_drift(Window(), Window(forward_s=0.01), update_s=1.0, unit_bytes=10) == []
    assert window_drift(before, dataclasses.replace(before, device_bytes=109), update_s=1.0, unit_bytes=10) == []
    assert window_drift(before, dataclasses.replace(before, device_bytes=90), update_s=1.0, unit_bytes=10)


# --- numbers and files


def test_the_report_s_numbers() -> None:
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7), _plan(), _config(resident_fraction=0.0, replan_interval=0))
    assert run.online is not None
    run.step(4)
    report = run.online.report()
    timeline = simulate(run.states.plan, run.states.subgroups, TRUTH, WIDTHS, Window(backward_s=1e-7))
    assert report["offload/update_s"] == pytest.approx(timeline.update_s)
    assert report["offload/error"] == pytest.approx(report["offload/update_s"] / report["offload/predicted_s"] - 1)
    assert report["offload/exposed_s"] >= report["offload/update_s"]
    assert report["offload/host_gib"] == run.states.host_bytes / 2**30
    assert report["offload/device_gib"] == run.states.device_bytes / 2**30
    streamed = len(run.states.plan.streamed)
    assert report["offload/fraction"] == pytest.approx(streamed / 10)
    assert 0 < report["offload/up_gb_s"] <= 50
    assert all(math.isfinite(value) for value in report.values())


def test_the_host_is_watched_too() -> None:
    weight = torch.ones(SIZE, dtype=torch.bfloat16)
    config = _config(fraction=0.5, replan_interval=2)
    states = OffloadedStates([weight], [0], config, gradient_dtype=torch.float32, device=InlineDevice())
    plan = states.plan
    online = Online(states, constants=TRUTH)
    states.watcher = online
    for step in range(1, 8):
        states.start_early()
        states.update([torch.ones(SIZE)], SETTINGS, step)
    report = online.report()
    assert states.plan is plan
    assert report["offload/replans"] == 0
    assert report["offload/update_s"] > 0
    assert report["offload/predicted_s"] > 0
    assert report["offload/device_gib"] == 0
    # Estimates have left the constants of a fast machine far behind: thousand elements are all overhead.
    assert online.constants.cpu_adam < TRUTH.cpu_adam / 2
    online.close()
    states.update([torch.ones(SIZE)], SETTINGS, 8)
    assert states.device.collect() == []  # type: ignore[attr-defined]  # nothing is kept for nobody


@pytest.mark.parametrize(("interval", "late", "written"), [(0, False, []), (3, False, [12, 15]), (3, True, [12, 15])])
def test_timelines_are_written_when_asked_for(tmp_path: Path, interval: int, late: bool, written: list[int]) -> None:
    config = _config(timeline_interval=interval, replan_interval=0, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7, late=late), _plan(), config, folder=tmp_path / "offload", rank=2)
    assert run.online is not None
    run.online.begin(10)
    run.step(5)
    run.device.late = False
    run.online.close()
    names = sorted(path.name for path in tmp_path.glob("offload/*"))
    assert names == [f"step_{n}_rank_2.{kind}" for n in written for kind in ("json", "png")]
    for number in written:
        trace = json.loads((tmp_path / "offload" / f"step_{number}_rank_2.json").read_text())
        assert trace["otherData"]["step"] == number
        assert trace["otherData"]["measured_update_s"] == pytest.approx(trace["otherData"]["predicted_update_s"], 0.5)
        phases = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "phase" and e["pid"] == 4]
        assert "last backward" in phases


def test_widths_are_those_of_most_elements() -> None:
    weights = [torch.ones(70, dtype=torch.bfloat16), torch.ones(30)]
    config = _config(master="low_bits", subgroup_size=64)
    states = OffloadedStates(weights, [0, 0], config, gradient_dtype=torch.float32, device=InlineDevice())
    assert shape_widths(states.shape) == Widths(state=10, gradient=4, weight=2, weight_down=True)


# --- in the training loop


class _Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def _record(step: int, seconds: dict[str, float]) -> StepRecord:
    return StepRecord(
        step=step, loss=1.0, grad_norm=1.0, learning_rate=1.0, tokens=1, metrics={},
        seconds={"step": 1.0, "data": 0.0, **seconds}, memory_gib=0.0,
    )  # fmt: skip


def _trainer(engine: Any, step: int) -> Any:
    train = SimpleNamespace(log_interval=2, steps=100)
    return SimpleNamespace(
        engine=engine, state=SimpleNamespace(step=step), host_batches=[{}, {}], config=SimpleNamespace(train=train)
    )


def test_the_loop_logs_what_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dataclasses.replace(TRUTH, h2d=5e9, d2h=5e9, h2d_duplex=4.5e9, d2h_duplex=4.5e9)
    run = Run(ClockedDevice(slow), _plan(), _config(replan_interval=3, timeline_interval=4, overlap=False), watch=False)
    monkeypatch.setattr("pretrain.optim.offload.online.probed", lambda device, threads: TRUTH)
    log, engine = _Log(), SimpleNamespace(offload=SimpleNamespace(states=run.states))
    callback = OffloadCallback(log, tmp_path / "offload", rank=0)
    trainer = _trainer(engine, 20)
    callback.on_start(trainer)
    records = []
    for step in range(21, 30):
        run.step(1, early=False)
        records.append(_record(step, {"forward": 4e-8}))
        callback.after_step(trainer, records[-1])
    assert [bool(record.metrics) for record in records] == [step % 2 == 0 for step in range(21, 30)]
    assert records[-2].metrics["offload/update_s"] > 0
    decisions = [fields for event, fields in log.events if event == "offload"]
    assert decisions
    assert decisions[0]["step"] == 23
    assert isinstance(run.states.watcher, Online)
    assert run.states.watcher.window.forward_s == 2e-8
    # After going back steps are named as the run names them.
    trainer.state.step = 23
    callback.on_rollback(trainer)
    run.step(1, early=False)
    callback.on_end(trainer, False)
    assert sorted(p.name for p in tmp_path.glob("offload/*.json")) == ["step_24_rank_0.json", "step_28_rank_0.json"]


def test_an_engine_without_offloading_is_left_alone(tmp_path: Path) -> None:
    callback, record = OffloadCallback(_Log(), tmp_path, rank=0), _record(2, {})
    for engine in (SimpleNamespace(), SimpleNamespace(offload=None)):
        trainer = _trainer(engine, 0)
        callback.on_start(trainer)
        callback.after_step(trainer, record)
        callback.on_rollback(trainer)
        assert callback.on_end(trainer, False) is False
    assert record.metrics == {}
