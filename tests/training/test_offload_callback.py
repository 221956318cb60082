"""Offloaded optimizer state in the training loop: what is logged and drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.clocked_device import (
    SLOW_LINK,
    TRUTH,
    ClockedDevice,
    Run,
    offload_config,
    plan_of,
)

from pretrain.optim.offload.online import Online
from pretrain.training.offload_callback import OffloadCallback
from pretrain.training.state import StepRecord


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
    run = Run(
        ClockedDevice(SLOW_LINK),
        plan_of(),
        offload_config(replan_interval=3, timeline_interval=4, overlap=False),
        watch=False,
    )
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
