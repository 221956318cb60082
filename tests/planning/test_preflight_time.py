"""The length of a run: measured where something was measured, said to be unknown where nothing was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers.run_dir import RunDir
from pretrain.config.launch_schema import LifecycleConfig, SlurmConfig
from pretrain.config.schema import TrainConfig
from pretrain.planning.preflight import walltime
from pretrain.planning.preflight.findings import Finding, Level
from pretrain.planning.preflight.pace import pace_of
from pretrain.planning.preflight.subject import Subject
from pretrain.tracking.metrics_log import MetricsLog

TREE: dict[str, Any] = {
    "model": {"_target_": "m", "width": 8},
    "engine": {"name": "deepspeed", "zero_stage": 1},
    "train": {"global_batch_size": 8, "micro_batch_size": 2},
    "launcher": {"name": "slurm", "num_processes": 4, "num_nodes": 2},
}


def _run(root: Path, name: str, tree: dict[str, Any], steps: int = 20, step_s: float = 10.0) -> RunDir:
    """A run whose attempt took a minute to its first step."""
    run = RunDir.create(tree, path=root / name)
    with MetricsLog(run.metrics_path, 1) as log:
        begun = log.write("start", 0, steps=100)["time"]
        for step in range(1, steps + 1):
            seconds = 99.0 if step <= 2 else step_s
            log.write("train", step, metrics={"loss": 1.0, "step_s": seconds})
        log.write("eval", steps, metrics={"validation_loss": 1.0}, seconds=50.0)
        log.write("checkpoint", steps, seconds=30.0, stall_s=5.0)
    entry = {"time": begun - 60.0 - 99.0, "event": "attempt_started", "attempt": 1}
    (run.path / "lifecycle.jsonl").write_text(json.dumps(entry) + "\n")
    return run


def test_what_is_read_from_a_run(tmp_path: Path) -> None:
    pace = pace_of(_run(tmp_path, "run", TREE).path)
    assert pace is not None
    assert (pace.step_s, pace.steps, pace.eval_s, pace.stall_s, pace.save_s) == (10.0, 18, 50.0, 5.0, 30.0)
    assert pace.startup_s == pytest.approx(60.0, abs=5.0)


def test_a_run_of_a_few_steps_tells_nothing(tmp_path: Path) -> None:
    assert pace_of(_run(tmp_path, "run", TREE, steps=4).path) is None


@pytest.fixture
def planned(subject: Callable[..., Subject], tmp_path: Path) -> Callable[..., list[Finding]]:
    """Findings about 1000 steps with 10 validations and 5 checkpoints."""

    def look(tree: dict[str, Any] = TREE, lifecycle: LifecycleConfig | None = None, **launcher: Any) -> list[Finding]:
        train = TrainConfig(steps=1000, eval_interval=100, checkpoint_interval=200)
        settings = SlurmConfig(num_processes=4, num_nodes=2, **launcher)
        made = subject(tree=tree, train=train, launcher=settings, lifecycle=lifecycle or LifecycleConfig())
        return list(walltime.check(made))

    return look


def test_unknown_is_said(planned: Callable[..., list[Finding]], tmp_path: Path) -> None:
    (found,) = planned()
    assert found.level is Level.UNKNOWN
    assert str(tmp_path) in found.found


def test_jobs_follow_from_what_was_measured(planned: Callable[..., list[Finding]], tmp_path: Path) -> None:
    _run(tmp_path, "equal", TREE)
    (found,) = planned(time_limit="01:00:00")
    assert found.level is Level.OK
    assert found.figures["seconds"] == 1000 * 10 + 10 * 50 + 5 * 5
    # 10,525 s in jobs of 3600 s less a minute of start, 2 x 30 s for the last checkpoint and one step.
    assert found.figures["jobs"] == 4


@pytest.mark.parametrize(
    "difference",
    [
        {"model": {"_target_": "m", "width": 16}},
        {"launcher": {"name": "slurm", "num_processes": 8, "num_nodes": 2}},
        {"engine": {"name": "deepspeed", "zero_stage": 2}},
        {"train": {"global_batch_size": 8, "micro_batch_size": 4}},
    ],
)
def test_another_model_or_layout_tells_nothing(
    planned: Callable[..., list[Finding]], tmp_path: Path, difference: dict[str, Any]
) -> None:
    _run(tmp_path, "other", TREE | difference)
    assert [found.level for found in planned()] == [Level.UNKNOWN]


def test_what_does_not_matter_may_differ(planned: Callable[..., list[Finding]], tmp_path: Path) -> None:
    longer = {"train": {**TREE["train"], "steps": 7}, "optimizer": {"learning_rate": 1.0}, "run": {"name": "x"}}
    _run(tmp_path, "equal", TREE | longer)
    assert [found.level for found in planned()] == [Level.OK]


def test_jobs_that_are_not_allowed_for(planned: Callable[..., list[Finding]], tmp_path: Path) -> None:
    _run(tmp_path, "equal", TREE)
    assert [found.what for found in planned(max_restarts=0)][1:] == ["launcher.max_restarts"]
    assert [found.what for found in planned(max_restarts=1)][1:] == []
    stop = LifecycleConfig(on_time_limit="stop")
    assert [found.what for found in planned(lifecycle=stop)][1:] == ["lifecycle.on_time_limit"]


def test_a_time_limit_without_room_for_a_step(planned: Callable[..., list[Finding]], tmp_path: Path) -> None:
    _run(tmp_path, "equal", TREE)
    (found,) = planned(time_limit="00:02:00")
    assert (found.level, found.what) == (Level.ERROR, "launcher.time_limit")


def test_a_continued_run_counts_what_is_left_of_it(subject: Callable[..., Subject], tmp_path: Path) -> None:
    run = _run(tmp_path, "own", TREE)
    (run.checkpoints_path / "step_00000020").mkdir()
    made = subject(run=run, tree=TREE, train=TrainConfig(steps=30, eval_interval=0, checkpoint_interval=0))
    (found,) = walltime.check(made)
    assert found.figures["seconds"] == 100.0
