"""A run of a mixture of experts from the command line, and what it logs."""

from __future__ import annotations

from typing import Any

import pytest
from support.command import Outcome

from pretrain.tracking.metrics_log import read_records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = ("loss", "grad_norm", "router_balance_loss", "router_z_loss", "busiest_expert")


def logged(outcome: Outcome) -> list[list[float]]:
    records = [record for record in read_records(outcome.path / "metrics.jsonl") if record["event"] == "train"]
    return [[record["metrics"][name] for name in NAMES] for record in records]


def test_routers_are_logged_alike_by_one_process_and_a_pipeline(start: Any) -> None:
    common = ("model=moe_tiny", "train.steps=3", "train.activation_checkpointing=layers")
    one, first = start("one", *common)
    assert one.returncode == 0, one.stderr
    two, second = start("two", *common, "engine=megatron", "engine.pipeline_parallel=2", "launcher.num_processes=2")
    assert two.returncode == 0, two.stderr
    steps = logged(first)
    assert len(steps) == 3
    for found, expected in zip(logged(second), steps, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for _, _, balance, z, busiest in steps:
        assert 1.0 <= busiest < 4 / 2  # two of four experts a token: the mean is half the tokens
        assert 0.9 < balance < 2.0
        assert z > 0
    assert first.validation().keys() == second.validation().keys() == {3}
