"""What a replay takes its settings from, and what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain
from support.small_text import small_run

from data_pipeline.errors import DamagedDataError
from data_pipeline.quarantine import BadData
from launchers.run_dir import RunDir
from pretrain.commands import replay
from pretrain.config.check import check
from pretrain.config.compose import compose, resolve_paths
from pretrain.config.freeze import frozen_for_new_run
from pretrain.tracking.metrics_log import MetricsLog
from pretrain.training.replay_target import ReplayError, replay_target

OLD, LATER = "2001-09-09 01:46:40Z", "2033-05-18 03:33:20Z"  # unix 1e9, 2e9


@pytest.fixture
def run(data_path: Path, tmp_path: Path) -> RunDir:
    """Three attempts: 8 steps; 4 more with another horizon; and again from step 6 with two processes."""
    tree = frozen_for_new_run(resolve_paths(compose(small_run(data_path)), str(tmp_path)))
    made = RunDir.create(tree, path=tmp_path / "run")
    later = tree | {"train": tree["train"] | {"steps": 12}}
    made.add_revision(later, ["train.steps"])
    made.add_revision(later | {"launcher": later["launcher"] | {"num_processes": 2}}, ["launcher.num_processes"])
    for attempt, first, last, revision in ((1, 0, 8, 0), (2, 8, 12, 1), (3, 6, 10, 2)):
        with MetricsLog(made.metrics_path, attempt) as log:
            log.write("start", step=first, revision=revision)
            for step in range(first + 1, last + 1):
                log.write("train", step=step, metrics={"loss": 1.0, "grad_norm": 1.0, "step_s": 100.0})
    return made


@pytest.mark.parametrize(("step", "attempt", "revision", "others"), [(3, 1, 0, []), (6, 1, 0, []), (7, 3, 2, [0])])
def test_settings_are_those_of_the_attempt_that_made_the_step(
    run: RunDir, step: int, attempt: int, revision: int, others: list[int]
) -> None:
    target = replay_target(run, 4, step)
    assert (target.attempt, target.revision, target.other_revisions) == (attempt, revision, others)
    _, config, differs = replay.settings(run, target, [])
    assert config.train.steps == (8 if revision == 0 else 12)
    assert len(differs) == len(others)
    if others:
        assert "made with other settings (revision 0), here with those of revision 2" in differs[0]


def test_attempts_that_did_not_name_their_revision_had_the_newest_of_their_time(run: RunDir) -> None:
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    for record in records:
        record.pop("revision", None)
        record["time"] = 1.5e9
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for number, date in ((1, OLD), (2, LATER)):
        path = run.revision_path(number)
        path.write_text(f"# revision {number}, {date}\n" + path.read_text().partition("\n")[2])
    assert replay_target(run, 4, 7).revision == 1


def test_a_step_only_tried_before_going_back_was_not_made(run: RunDir) -> None:
    with MetricsLog(run.metrics_path, 3) as log:
        log.write("health", step=11, to_step=2, action="rollback")
        log.write("train", step=3, metrics={"loss": 2.0})
    assert replay_target(run, 4, 3).attempt == 3, "gone back to a step before that at which the attempt began"
    with pytest.raises(ReplayError, match="has made 3 steps"):
        replay_target(run, 4, 5)


def test_overrides_say_where_it_is_replayed_but_not_what(run: RunDir) -> None:
    target = replay_target(run, 4, 8)
    _, config, differs = replay.settings(run, target, ["launcher=local", "launcher.num_processes=1", "engine=megatron"])
    assert (config.launcher.num_processes, config.engine.name) == (1, "megatron")
    assert "launcher.num_processes: 2 -> 1" in differs
    with pytest.raises(ReplayError, match=r"train\.steps: 12 -> 20: a replay may change only fields of launcher"):
        replay.settings(run, target, ["train.steps=20"])


def test_more_processes_than_devices_are_refused_with_a_way_out(data_path: Path) -> None:
    config = check(compose([*small_run(data_path), "launcher.num_processes=4", "train.micro_batch_size=1"]))
    replay.check_room(config, None)
    replay.check_room(config, 4)
    with pytest.raises(ReplayError, match=r"this machine has 2\. .*launcher=local launcher\.num_processes=2,.*srun"):
        replay.check_room(config, 2)


def test_a_long_way_is_told_before_it_is_gone(run: RunDir) -> None:
    target = replay_target(run, 4, 8)
    config = replay.settings(run, target, [])[1]
    text = replay.plan_of(target, config, None)
    assert "settings: revision 2, of attempt 3; needs on this machine: 2 process(es), on CPU" in text
    assert (
        "warning: no nearer checkpoint before step 8 is left: steps 1..7 are trained again first, about 12 min" in text
    )


def test_the_verdict_names_what_differs_before_it_blames_the_machine() -> None:
    result: dict[str, Any] = {"reproduced": False, "recorded_loss": 2.0, "differs": ["torch 2.1 -> 2.2"]}
    assert "torch 2.1 -> 2.2" in replay._verdict(result)
    assert "faulty" not in replay._verdict(result)
    assert "faulty device" in replay._verdict(result | {"differs": []})


def test_a_quarantine_is_recalled_without_writing(tmp_path: Path) -> None:
    first = BadData("substitute")
    first.keep(tmp_path / "quarantine", 0)
    first.damaged(DamagedDataError("torn", shard="a.tar", member="m", byte=0))
    content = (tmp_path / "quarantine" / "rank_00000.jsonl").read_text()
    second = BadData("substitute")
    second.recall(tmp_path / "quarantine")
    assert second.known("a.tar", "m") is not None
    second.damaged(DamagedDataError("torn too", shard="a.tar", member="n", byte=0))
    assert (tmp_path / "quarantine" / "rank_00000.jsonl").read_text() == content
    BadData("substitute").recall(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_output_that_cannot_be_made_is_said_in_one_line(run: RunDir) -> None:
    result = pretrain("replay", run.path.name, "--root", run.path.parent, "--step", 3, "--output", "/proc/none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output /proc/none cannot be made (")
    assert "Traceback" not in result.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_a_step_made_before_the_schedule_changed_is_reproduced(start: Callable[..., Any], tmp_path: Path) -> None:
    result, run = start("long", "launcher.num_processes=2", "train.eval_interval=0", "tracking.enabled=false")
    assert result.returncode == 0, result.stderr
    resumed = pretrain("resume", run.path, "train.steps=12", "optimizer.schedule.horizon=12")
    assert resumed.returncode == 0, resumed.stderr
    for step, words in ((7, "settings of revision 0"), (12, "settings of revision 1")):
        replayed = pretrain("replay", run.path, "--step", step, "--output", tmp_path / str(step), cwd=tmp_path)
        assert replayed.returncode == 0, replayed.stdout + replayed.stderr
        assert words in replayed.stdout
        assert "the loss on record is reproduced exactly" in replayed.stdout

    alone = pretrain(
        *("replay", run.path, "--step", 12, "launcher=local", "launcher.num_processes=1"),
        *("--output", tmp_path / "alone"),
        cwd=tmp_path,
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    found = json.loads((tmp_path / "alone" / "replay.json").read_text())
    assert found["loss"] == pytest.approx(found["recorded_loss"], rel=1e-4)
    assert found["processes"] == 1
    assert "launcher.num_processes: 2 -> 1" in found["differs"]
