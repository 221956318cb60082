"""The judge of steps, and which batches are left out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.launch_schema import HealthConfig
from pretrain.tracking.metrics_log import effective_records
from pretrain.training.health import HealthMonitor, window_before
from pretrain.training.health_records import HealthRecordError, HealthRecords, read_events
from pretrain.training.replay_target import batch_of_step
from pretrain.training.state import TrainState


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_numbers_that_are_none_are_a_fault_from_the_first_step_on(loss: float, norm: float) -> None:
    fault = HealthMonitor(HealthConfig(on_nonfinite="skip")).judge(loss, norm)
    assert fault is not None
    assert (fault.kind, fault.action) == ("nonfinite", "skip")


def test_a_spike_is_measured_in_robust_deviations_of_good_steps_only() -> None:
    monitor = HealthMonitor(HealthConfig(on_spike="skip", spike_window=5, spike_zscore=8.0))
    for loss in (2.0, 2.1, 1.9, 2.05):
        monitor.passed(loss)
    assert monitor.judge(50.0, 1.0) is None, "the window is not full"
    monitor.passed(1.95)
    # Median 2, deviations 0, 0.05, 0.05, 0.1, 0.1: sigma is 1.4826 * 0.05.
    sigma = 1.4826 * 0.05
    assert monitor.judge(2.0 + 7.9 * sigma, 1.0) is None
    assert monitor.judge(0.0, 1.0) is None, "a loss that falls is no spike"
    fault = monitor.judge(2.0 + 8.1 * sigma, 1.0)
    assert fault is not None
    assert fault.median == 2.0
    assert fault.zscore == pytest.approx(8.1)
    # A continued run judges alike.
    other = HealthMonitor(monitor.config)
    other.load_state_dict(monitor.state_dict())
    assert other.judge(2.0 + 8.1 * sigma, 1.0) == fault


def test_losses_that_hardly_vary_make_no_spikes_of_nothing() -> None:
    monitor = HealthMonitor(HealthConfig(on_spike="stop", spike_window=3))
    for _ in range(3):
        monitor.passed(4.0)
    assert monitor.judge(4.0 * 1.007, 1.0) is None
    assert monitor.judge(4.0 * 1.009, 1.0) is not None


def test_the_window_counts_batches_that_were_trained_on() -> None:
    assert window_before(9, 3, {8, 6}) == [5, 7, 9]
    assert window_before(1, 4, set()) == [0, 1]


def test_state_passes_over_what_is_left_out() -> None:
    state = TrainState()
    state.skip([0, 2, 3])
    batches = []
    for _ in range(3):
        batches.append(state.next_batch(4))
        state.advance(4, 10)
    assert batches == [1, 4, 5]
    assert batches == [batch_of_step(step, [0, 2, 3]) for step in (1, 2, 3)]
    assert (state.step, state.samples, state.tokens) == (3, 24, 30)
    assert TrainState.from_dict(state.to_dict()) == state
    # Written before anything could be left out.
    assert TrainState.from_dict({"step": 3, "samples": 12, "tokens": 1}).next_batch(4) == 3
    # Back behind batch 4: what lies ahead stays left out.
    state.skip([4])
    state.go_back({"step": 1, "samples": 8, "tokens": 10, "skipped": [0]}, 4)
    assert (state.step, state.next_batch(4), state.skipped) == (1, 5, [0, 2, 3, 4])


def test_a_damaged_record_is_refused_by_name(tmp_path: Path) -> None:
    records = HealthRecords(tmp_path / "health", 1, fence=lambda: None)
    path = records.add(7, {"batch": 6, "action": "skip", "skipped": [6], "loss": math.nan})
    assert [event["skipped"] for event in read_events(tmp_path / "health")] == [[6]]
    path.write_text(path.read_text()[:-9])
    with pytest.raises(HealthRecordError, match=r"step_00000007\.json is damaged"):
        read_events(tmp_path / "health")


def test_history_forgets_steps_gone_back_behind_but_no_bad_step() -> None:
    def train(step: int, loss: float) -> dict[str, object]:
        return {"event": "train", "attempt": 1, "step": step, "metrics": {"loss": loss}}

    first = {"event": "health", "attempt": 1, "step": 4, "action": "skip"}
    back = {"event": "health", "attempt": 1, "step": 5, "action": "rollback", "to_step": 2}
    records = [*(train(step, 1.0) for step in (1, 2, 3)), first, train(4, 1.0), back, train(3, 2.0)]
    kept = effective_records(records)
    assert [(r["event"], r["step"]) for r in kept] == [
        ("train", 1),
        ("train", 2),
        ("health", 4),
        ("health", 5),
        ("train", 3),
    ]


def test_checkpoints_of_one_step_can_be_set_aside_again_and_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for _ in range(3):
        for step in (2, 4):
            store.path(step).mkdir(exist_ok=True)
        store.set_aside(2, attempt=1)
    assert store.steps() == [2]
    assert sorted(path.name for path in (tmp_path / "set_aside_0001").iterdir()) == [
        "step_00000004",
        "step_00000004_2",
        "step_00000004_3",
    ]
