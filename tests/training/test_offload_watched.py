"""A run with offloaded optimizer state tells what its updates took and draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def test_a_run_logs_predicted_and_actual_times_and_writes_timelines(start: Callable[..., Any]) -> None:
    result, outcome = start(
        "offloaded",
        "train.steps=6",
        "train.log_interval=1",
        "optimizer.offload.enabled=true",
        "optimizer.offload.fraction=0.5",
        "optimizer.offload.subgroup_size=4000",
        "optimizer.offload.replan_interval=2",
        "optimizer.offload.timeline_interval=3",
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (outcome.path / "metrics.jsonl").read_text().splitlines()]
    records = {line["step"]: line["metrics"] for line in lines if line["event"] == "train"}
    assert sorted(records) == [1, 2, 3, 4, 5, 6]
    for metrics in records.values():
        assert metrics["offload/update_s"] > 0
        assert metrics["offload/predicted_s"] > 0
        assert 0.3 < metrics["offload/fraction"] < 0.7
        assert metrics["offload/host_gib"] > 0
        assert metrics["offload/replans"] == 0  # on the host there is nothing to choose
    drawn = sorted(path.name for path in (outcome.path / "offload").iterdir())
    assert drawn == [f"step_{step}_rank_0.{kind}" for step in (3, 6) for kind in ("json", "png")]
