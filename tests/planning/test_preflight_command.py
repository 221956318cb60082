"""``pretrain preflight`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.command import pretrain
from support.small_text import small_run

from launchers.run_dir import RunDir
from pretrain.config.compose import load_run_config


def _json(*arguments: Any, cwd: Path, code: int) -> dict[str, dict[str, Any]]:
    """Findings by what they are about."""
    done = pretrain("preflight", *arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_a_sound_run(data_path: Path, tmp_path: Path) -> None:
    done = pretrain("preflight", *small_run(data_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors, 0 warnings: nothing speaks against starting" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_faults_of_everything_at_once(data_path: Path, tmp_path: Path) -> None:
    """A rule between fields, a field, a file in the way of the run root; and what is sound is looked at still."""
    (tmp_path / "runs").write_text("")
    faults = ["train.global_batch_size=5", "optimizer.learning_rate=fast"]
    found = _json(*small_run(data_path), *faults, cwd=tmp_path, code=2)
    errors = {what for what, finding in found.items() if finding["level"] == "error"}
    assert errors == {"train.global_batch_size", "optimizer.learning_rate", "run.root"}
    assert found["tokenizer of text"]["level"] == "ok"


def test_an_unknown_experiment_is_a_finding_too(tmp_path: Path) -> None:
    assert set(_json("experiment=nothing", cwd=tmp_path, code=2)) == {"experiment"}


def test_of_a_run_that_is_to_go_on(data_path: Path, tmp_path: Path) -> None:
    tree, config = load_run_config([*small_run(data_path), f"run.root={tmp_path}"])
    run = RunDir.create(tree, path=tmp_path / "run")
    run.check_datasets(config.data.datasets())
    before = {path: path.stat().st_mtime_ns for path in sorted(run.path.rglob("*"))}
    found = _json(run.path, "train.steps=50", cwd=tmp_path, code=0)
    assert str(run.path / "datasets.json") in found
    assert found["tokens"]["figures"]["tokens"] == 50 * 4 * 32
    assert {path: path.stat().st_mtime_ns for path in sorted(run.path.rglob("*"))} == before
