"""The moment at which ranks are asked to save before the end of their time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from launchers.lifecycle.deadline import SLACK_S, Pace, lead_s
from pretrain.config.launch_schema import LifecycleConfig
from pretrain.tracking.metrics_log import MetricsLog

CONFIG = LifecycleConfig(save_margin=2.0, first_save_s=60.0)


def test_until_a_save_is_measured_the_configured_time_is_taken(tmp_path: Path) -> None:
    assert lead_s(tmp_path / "metrics.jsonl", CONFIG) == 120.0 + SLACK_S


def test_the_slowest_of_the_last_saves_and_steps_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pace = Pace(path)
    with MetricsLog(path, 1) as log:
        log.write("checkpoint", 1, seconds=500.0)  # long ago
        for step, seconds in enumerate((10.0, 12.0, 9.0, 10.0, 11.0), 2):
            log.write("checkpoint", step, seconds=seconds)
        log.write("train", 7, metrics={"loss": 1.0, "step_s": 3.0})
        pace.update()
        assert pace.lead_s(CONFIG) == 24.0 + 3.0 + SLACK_S
        # What is written later is taken in later; a save without its time is none.
        log.write("train", 8, metrics={"loss": 1.0, "step_s": 4.0})
        log.write("checkpoint", 8)
    pace.update()
    assert pace.lead_s(CONFIG) == 24.0 + 4.0 + SLACK_S
    assert lead_s(path, replace(CONFIG, save_margin=1.0)) == 12.0 + 4.0 + SLACK_S


def test_a_careful_lead_leaves_an_attempt_half_of_its_time(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "metrics.jsonl")
    assert pace.stop_time(CONFIG, began=0.0, end=3600.0) == 3600.0 - 125.0
    assert pace.stop_time(CONFIG, began=0.0, end=60.0) == 30.0
    # What was measured is needed, whatever is left.
    pace.take([{"event": "checkpoint", "seconds": 50.0}])
    assert pace.stop_time(CONFIG, began=0.0, end=60.0) == 60.0 - 50.0 - SLACK_S


def test_a_single_stall_is_no_measure_but_slow_steps_are(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "metrics.jsonl")
    pace.take([{"event": "checkpoint", "seconds": 0.1}])
    pace.take({"event": "train", "metrics": {"step_s": seconds}} for seconds in (0.2, 0.3, 43.0, 0.2))
    assert pace.lead_s(CONFIG) == 0.2 + 0.3 + SLACK_S
    pace.take([{"event": "train", "metrics": {"step_s": 40.0}}])
    assert pace.lead_s(CONFIG) == 0.2 + 40.0 + SLACK_S


@given(
    began=st.floats(0, 1e6),
    length=st.floats(1, 1e6),
    saves=st.lists(st.floats(0.01, 1e4), max_size=8),
    steps=st.lists(st.floats(0.001, 1e3), max_size=8),
    margin=st.floats(1, 5),
)
def test_a_measured_save_always_fits_before_the_end(
    began: float, length: float, saves: list[float], steps: list[float], margin: float
) -> None:
    config = replace(CONFIG, save_margin=margin)
    pace = Pace(Path("unread"))
    pace.take({"event": "checkpoint", "seconds": seconds} for seconds in saves)
    pace.take({"event": "train", "metrics": {"step_s": seconds}} for seconds in steps)
    end = began + length
    stop = pace.stop_time(config, began=began, end=end)
    assert stop <= end
    if saves:
        slow = sorted(steps, reverse=True)[1 if len(steps) >= 4 else 0] if steps else 0.0
        assert end - stop >= max(saves[-5:]) + slow - 1e-6 * max(1.0, end)
    assert end - stop <= pace.lead_s(config) + 1e-6 * max(1.0, end)


def test_the_rest_of_an_allocation_must_be_worth_it(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "metrics.jsonl")
    pace.take([{"event": "checkpoint", "seconds": 10.0}])
    lead = pace.lead_s(CONFIG)
    assert pace.time_enough(CONFIG, now=0.0, end=None, startup=1e9)
    assert not pace.time_enough(CONFIG, now=0.0, end=2 * lead + 39.0, startup=20.0)
    assert pace.time_enough(CONFIG, now=0.0, end=2 * lead + 41.0, startup=20.0)
