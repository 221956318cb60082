"""Bad steps of whole runs, started and continued by the command; and the step looked into afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain, same_tensors
from support.faults import fault, faulty

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMON = ["launcher.num_processes=2", "train.eval_interval=0"]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_goes_back_behind_bad_data_and_the_step_can_be_replayed(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    bad = faulty(fault("not_a_number", step=6, rank=1))
    result, run = start("bad", *COMMON, *bad, "health.on_nonfinite=rollback", "health.skip_window=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nonfinite: loss NaN" in result.stdout
    assert "going back to step 4 without batches [4, 5]" in result.stdout
    losses = run.losses()
    assert sorted(losses) == list(range(1, 9))

    # The same from the beginning: a run that is told before its first step.
    told, _ = start("told", *COMMON, *faulty(fault("raise", step=1, once=tmp_path / "once")))
    assert told.returncode != 0
    record = json.loads((run.path / "health" / "step_00000006.json").read_text())
    (tmp_path / "told" / "health").mkdir()
    (tmp_path / "told" / "health" / "step_00000006.json").write_text(json.dumps(record))
    resumed = pretrain("resume", tmp_path / "told")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    other = type(run)(tmp_path / "told")
    assert other.losses() == losses
    assert same_tensors(run.tensors(8), other.tensors(8)) == []

    (event,) = record["events"]
    assert [sample["id"] for sample in event["samples"]] == [20, 21, 22, 23]
    assert all(sample["provenance"][0] and sample["text"] for sample in event["samples"])

    before = contents(run.path)
    replayed = pretrain("replay", run.path, "--step", 6, "--output", tmp_path / "out", cwd=tmp_path)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert contents(run.path) == before
    assert "the loss on record is reproduced exactly" in replayed.stdout
    found = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert (found["batch"], found["loss"], found["steps_advanced"], found["skipped"]) == (5, "NaN", 1, [])
    assert [sample["id"] for sample in found["samples"]] == [20, 21, 22, 23]
    assert found["samples"][0]["text"].startswith(event["samples"][0]["text"][:50])
    assert found["not_finite"]["weights and optimizer state before the step"] == []
    assert len(found["not_finite"]["gradients"]) == len(found["gradients"]) > 3

    # A step that was made: its loss, and gradients that add up to the norm on record.
    made = pretrain("replay", run.path, "--step", 7, "--output", tmp_path / "made", cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    found = json.loads((tmp_path / "made" / "replay.json").read_text())
    assert (found["batch"], found["loss"], found["reproduced"]) == (8, losses[7], True)
    assert sum(row["norm"] ** 2 for row in found["gradients"]) ** 0.5 == pytest.approx(found["grad_norm"], rel=1e-4)
    mean = sum(s["loss"] * s["targets"] for s in found["samples"]) / sum(s["targets"] for s in found["samples"])
    assert mean == pytest.approx(found["loss"], rel=1e-5)
    beyond = pretrain("replay", run.path, "--step", 99, cwd=tmp_path)
    assert beyond.returncode == 2
    assert "has made 8 steps" in beyond.stderr


def test_a_stopped_run_goes_on_with_another_policy(start: Callable[..., Any]) -> None:
    result, run = start("stopped", *COMMON, *faulty(fault("not_a_number", step=3)))
    assert result.returncode == 5, result.stdout + result.stderr
    assert "Step 3: loss nan" in result.stdout + result.stderr
    resumed = pretrain("resume", run.path, "health.on_nonfinite=skip")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    events = json.loads((run.path / "health" / "step_00000003.json").read_text())["events"]
    assert [(event["attempt"], event["action"], event["skipped"]) for event in events] == [(2, "skip", [2])]
    assert sorted(run.losses()) == list(range(1, 9))
