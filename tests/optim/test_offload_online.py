"""The online model: drift plans anew, values never change, what is logged and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clocked_device import (
    SETTINGS,
    SIZE,
    SLOW_LINK,
    TRUTH,
    WIDTHS,
    ClockedDevice,
    Run,
    offload_config,
    plan_of,
)
from support.threaded_device import ThreadDevice

from pretrain.optim.offload.constants import Widths, Window
from pretrain.optim.offload.device import Event, InlineDevice, OperationTime
from pretrain.optim.offload.device_memory import Room
from pretrain.optim.offload.online import Online, shape_widths
from pretrain.optim.offload.schedule import Kind
from pretrain.optim.offload.simulate import simulate
from pretrain.optim.offload.states import OffloadedStates

# --- plans


def test_drift_plans_anew_and_says_why() -> None:
    device = ClockedDevice(TRUTH)
    plan = plan_of()
    run = Run(device, plan, offload_config(replan_interval=10, overlap=False, resident_fraction=0.0))
    assert run.online is not None
    run.step(20, early=False)
    before = run.online.report()
    assert run.states.plan == plan
    assert run.journal == []
    assert before["offload/replans"] == 0
    assert before["offload/error"] == pytest.approx(0.0, abs=0.02)
    device.truth = SLOW_LINK
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
    best = simulate(plan_of(SLOW_LINK, overlap=False), run.states.subgroups, SLOW_LINK, WIDTHS, Window()).exposed_s
    now = simulate(run.states.plan, run.states.subgroups, SLOW_LINK, WIDTHS, Window()).exposed_s
    assert now <= 1.1 * best
    assert abs(after["offload/error"]) < 0.1


def test_without_drift_the_plan_stays() -> None:
    plan = plan_of()
    run = Run(ClockedDevice(TRUTH), plan, offload_config(replan_interval=2, overlap=False, resident_fraction=0.0))
    run.step(30, early=False)
    assert run.states.plan is plan
    assert run.journal == []


@pytest.mark.parametrize(("interval", "changes"), [(0, False), (3, True), (1000, True)])
def test_the_interval_says_how_often_is_looked(interval: int, changes: bool) -> None:
    run = Run(
        ClockedDevice(SLOW_LINK),
        plan_of(),
        offload_config(replan_interval=interval, overlap=False, resident_fraction=0.0),
    )
    run.step(12, early=False)
    assert bool(run.journal) == changes
    if interval == 1000:  # the early look alone
        assert [entry["step"] for entry in run.journal] == [5]


def test_passes_around_the_update_are_found_and_used() -> None:
    device = ClockedDevice(TRUTH, backward_s=6e-8)
    plan = plan_of()
    run = Run(device, plan, offload_config(replan_interval=5, resident_fraction=0.0))
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
    config = offload_config(replan_interval=2, overlap=overlap, master="low_bits" if low_bits else "full")
    prior = dataclasses.replace(
        TRUTH, h2d=link * TRUTH.h2d, h2d_duplex=link * TRUTH.h2d_duplex, cpu_adam=cpu * TRUTH.cpu_adam
    )
    watched = Run(ClockedDevice(TRUTH, backward_s=3e-8), plan_of(), config, constants=prior)
    plain = Run(ClockedDevice(TRUTH, backward_s=3e-8), plan_of(fraction=0.0), config, watch=False)
    for run in (watched, plain):
        run.step(8)
    for one, other in zip(watched.values(), plain.values(), strict=True):
        assert torch.equal(one, other)


def test_the_bits_were_those_of_several_plans() -> None:
    run = Run(
        ClockedDevice(SLOW_LINK), plan_of(), offload_config(replan_interval=2, overlap=False, resident_fraction=0.0)
    )
    run.step(8, early=False)
    assert run.online is not None
    assert run.online.replans > 0


def test_no_room_for_what_is_asked_keeps_the_plan() -> None:
    room = iter([Room(usable=0, peak=0, held=0)] * 1000)
    run = Run(
        ClockedDevice(dataclasses.replace(TRUTH, h2d=5e9)), plan_of(fraction=0.5),
        offload_config(replan_interval=3, fraction=0.5, resident_fraction=0.0), memory=lambda: next(room),
    )  # fmt: skip
    plan = run.states.plan
    run.step(6)
    assert run.states.plan is plan
    assert "device_bytes" in run.journal[0]["error"]
    assert run.journal[0]["changed"] is False


def test_no_memory_for_a_better_plan_keeps_the_plan_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ClockedDevice(TRUTH)
    run = Run(device, plan_of(), offload_config(replan_interval=10, overlap=False, resident_fraction=0.0))
    run.step(20, early=False)
    plan = run.states.plan
    run.journal.clear()
    rooms = iter([None])

    def short_of(give: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        def short(num_bytes: int) -> torch.Tensor:
            if next(rooms, num_bytes) is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return give(num_bytes)

        return short

    # Whatever the new plan needs first, on either side.
    for side in ("empty_device", "empty_host"):
        monkeypatch.setattr(device, side, short_of(getattr(device, side)))
    device.truth = SLOW_LINK
    run.step(10, early=False)
    assert run.journal[0]["changed"] is False
    assert run.journal[0]["error"] == "CUDA out of memory"
    assert run.states.plan == plan
    run.step(20, early=False)  # and by the next look there is memory, or the plan stays: training goes on


# --- a device that the host runs ahead of


def test_times_that_come_late_are_those_of_their_step() -> None:
    config = offload_config(replan_interval=0, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7, late=True), plan_of(), config)
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
    config = offload_config(replan_interval=0, resident_fraction=0.0)
    plan = dataclasses.replace(plan_of(), num_early=2)
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


# --- threads in place of streams


class TimedThreads(ThreadDevice):
    """Tells times as a GPU's device does: by the same code."""

    def measure(self, on: bool) -> None:
        self.issuer.measure(on)

    def collect(self) -> list[OperationTime]:
        return self.issuer.collect()

    def time(self, event: Event) -> float | None:
        return self.issuer.time(event)


def test_steps_on_queues_that_run_side_by_side_are_put_together() -> None:
    weight = torch.ones(SIZE, dtype=torch.bfloat16)
    plan = dataclasses.replace(plan_of(fraction=0.5), num_early=2)
    with TimedThreads() as device:
        config = offload_config(replan_interval=0, fraction=0.5)
        states = OffloadedStates([weight], [0], config, gradient_dtype=torch.float32, device=device, plan=plan)
        watcher = Online(states, constants=TRUTH)
        states.watcher = watcher
        for step in range(1, 6):
            states.start_early()
            states.update([torch.ones(SIZE)], SETTINGS, step)
        device.settle()  # the model's queue too, whose marks bound the step
        watcher.close()
        assert watcher.last is not None
        number, measured, predicted = watcher.last
    assert number == 5
    keys = {(t.operation.kind, t.operation.subgroup) for t in measured.operations}
    assert keys == {(t.operation.kind, t.operation.subgroup) for t in predicted.operations}
    assert all(t.start <= t.end for t in measured.operations)
    new = max(t.end for t in measured.operations if t.operation.kind is not Kind.FLUSH)
    assert measured.update_s >= new > 0


# --- numbers and files


def test_the_report_s_numbers() -> None:
    run = Run(
        ClockedDevice(TRUTH, backward_s=1e-7), plan_of(), offload_config(resident_fraction=0.0, replan_interval=0)
    )
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
    config = offload_config(fraction=0.5, replan_interval=2)
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
    config = offload_config(timeline_interval=interval, replan_interval=0, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH, backward_s=1e-7, late=late), plan_of(), config, folder=tmp_path / "offload", rank=2)
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
    config = offload_config(master="low_bits", subgroup_size=64)
    states = OffloadedStates(weights, [0, 0], config, gradient_dtype=torch.float32, device=InlineDevice())
    assert shape_widths(states.shape) == Widths(state=10, gradient=4, weight=2, weight_down=True)
