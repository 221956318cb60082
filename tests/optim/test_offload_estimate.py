"""Estimates of constants, what drift is, how memory is told apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clocked_device import (
    SIZE,
    SUBGROUP,
    TRUTH,
    WIDTHS,
    ClockedDevice,
    Run,
    offload_config,
    plan_of,
)

from pretrain.optim.offload.constants import Window
from pretrain.optim.offload.device_memory import Envelope, Room
from pretrain.optim.offload.drift import constants_drift, window_drift
from pretrain.optim.offload.estimate import Estimate
from pretrain.optim.offload.schedule import Kind
from pretrain.optim.offload.simulate import simulate
from pretrain.optim.offload.subgroups import Target, cut_subgroups
from pretrain.parallel import peak_memory

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
    plan = plan_of(window=window, fraction=fraction, overlap=overlap)
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
    plan = dataclasses.replace(plan_of(fraction=0.0), early_gradients=False)
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
    timeline = simulate(plan_of(fraction=0.0), subgroups, TRUTH, WIDTHS, Window())
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
    estimate.add(simulate(plan_of(), subgroups, slow, WIDTHS, Window()).operations)
    assert estimate.constants == slow


# --- memory


def test_what_the_last_backward_pass_sets_free_is_told_apart() -> None:
    envelope = Envelope()
    assert not envelope.is_known
    # 100 in all; the model takes 60 at most and 30 in the end; buffers of 10 are always there.
    envelope.add_before_early(Room(100, 70, 70), own=10)
    envelope.add_before_update(Room(100, 65, 40), own=10)
    assert (envelope.device_bytes, envelope.early_bytes) == (40, 30)
    # It takes 65 at most and 25 in the end; 20 of state are brought as memory becomes free.
    envelope.add_before_early(Room(100, 75, 75), own=10)
    envelope.add_before_update(Room(100, 85, 55), own=10, early=20)
    assert (envelope.device_bytes, envelope.early_bytes) == (35, 35)
    # Recomputing in the backward pass takes more than the forward pass did.
    recomputed = Envelope()
    recomputed.add_before_early(Room(100, 40, 40), own=10)
    recomputed.add_before_update(Room(100, 70, 20), own=10)
    assert (recomputed.device_bytes, recomputed.early_bytes) == (40, 50)
    # That is remembered when early state hides it.
    recomputed.add_before_early(Room(100, 40, 40), own=10)
    recomputed.add_before_update(Room(100, 95, 50), own=10, early=30)
    assert (recomputed.device_bytes, recomputed.early_bytes) == (40, 50)


def test_a_model_that_needs_more_takes_memory_back() -> None:
    usable = 4 * 1200 + 1000  # three buffers and a little
    peaks = [1000 + 3600]

    def memory() -> Room:
        return Room(usable, peaks[0], peaks[0])

    config = offload_config(replan_interval=4, overlap=False, resident_fraction=0.0)
    run = Run(ClockedDevice(TRUTH), plan_of(window=Window(device_bytes=3600)), config, memory=memory)
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
