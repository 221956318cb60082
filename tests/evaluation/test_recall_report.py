"""Which runs ``benchmarks/recall.py`` takes for its own, and what it reports of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.compose import load_run_config
from pretrain.config.freeze import dump, frozen_for_new_run

RECALL = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def recall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(RECALL))
    module = importlib.import_module("recall")
    results = importlib.import_module("results_file")
    for place in (module, results):
        monkeypatch.setattr(place, "RESULTS", tmp_path / "results")
    return module


def frozen_run(path: Path, architecture: list[str], name: str, seed: int, *changes: str) -> None:
    """A run directory as ``pretrain run`` begins it."""
    overrides = ["experiment=mqar", *architecture, f"run.name=recall_{name}", f"run.seed={seed}", *changes]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump(frozen_for_new_run(load_run_config(overrides)[0])))


def record_run(path: Path, accuracy: float, *, killed: bool = False) -> None:
    """Records of 30 seconds of work; with ``killed``, of a first attempt that stopped after another 50 seconds."""
    records: list[dict[str, Any]] = []
    if killed:
        records += [
            {"time": 100.0, "attempt": 1, "event": "start", "step": 0, "parameters": 64000},
            {"time": 150.0, "attempt": 1, "event": "train", "step": 1, "metrics": {"step_s": 0.5}},
        ]
    last = 2 if killed else 1
    metrics = {"validation_loss": 1.0, "validation_accuracy": accuracy, "validation/16_pairs/accuracy": accuracy}
    records += [
        {"time": 1000.0, "attempt": last, "event": "start", "step": 0, "parameters": 64000},
        {"time": 1010.0, "attempt": last, "event": "train", "step": 1, "metrics": {"step_s": 0.5}},
        {"time": 1020.0, "attempt": last, "event": "eval", "step": 1, "metrics": metrics},
        {"time": 1030.0, "attempt": last, "event": "end", "step": 1, "status": "finished"},
        {"time": 9000.0, "attempt": last, "event": "harness", "step": 1, "metrics": {}},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "git.json").write_text(json.dumps({"revision": f"r{accuracy}", "dirty": False, "repository": "/x"}))
    (path / "artifacts").mkdir()
    (path / "artifacts" / "summary.json").write_text('{"completed_steps": 1}')


def test_a_run_is_known_by_its_whole_configuration(recall: Any, tmp_path: Path, monkeypatch: Any) -> None:
    work = tmp_path / "work"
    new = recall.run_folder(work, "mamba2", 1)
    assert new.parent.parent == work
    monkeypatch.chdir(tmp_path)  # the folder does not depend on where the command is called
    assert recall.run_folder(work, "mamba2", 1) == new
    # A field of another file than the experiment's has changed since that run.
    frozen_run(work / "aaaa" / "mamba2_seed1", ["model.pattern='MM'"], "mamba2", 1, "optimizer.weight_decay=0.77")
    assert recall.run_folder(work, "mamba2", 1) == new
    frozen_run(work / "bbbb" / "mamba2_seed1", ["model.pattern='MM'"], "mamba2", 1)
    assert recall.run_folder(work, "mamba2", 1) == work / "bbbb" / "mamba2_seed1"
    assert recall.run_folder(work, "mamba2", 2) != work / "bbbb" / "mamba2_seed2"


def test_time_of_every_attempt_counts(recall: Any, tmp_path: Path) -> None:
    for name, killed, seconds in (("whole", False, 30.0), ("killed", True, 80.0)):
        (tmp_path / name).mkdir()
        record_run(tmp_path / name, 0.5, killed=killed)
        found = recall.read(tmp_path / name)
        assert (found["wall_s"], found["attempts"]) == (seconds, 1 + killed)
        assert found["git"] == [{"revision": "r0.5", "dirty": False}]


def test_an_incomplete_report_says_so_and_judges_nothing(
    recall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    work = tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["recall.py", "--work", str(work), "--seeds", "1", "--report"])
    with pytest.raises(SystemExit, match="no finished run"):
        recall.main()
    for number, name in enumerate(recall.ARCHITECTURES):
        path = recall.run_folder(work, name, 1)
        frozen_run(path, recall.ARCHITECTURES[name], name, 1)
        record_run(path, 1.0 if name in ("transformer", "hybrid") else 0.1)
        capsys.readouterr()
        recall.main()
        complete = number + 1 == len(recall.ARCHITECTURES)
        told = capsys.readouterr().out
        assert ("These runs agree" in told) == ("seeds reach" in told) == complete
        assert (f"**Incomplete: {number + 1} of 5 runs.**" in told) != complete
        assert (results / "recall.json").exists() == (results / "recall.md").exists() == complete
    found = json.loads((results / "recall_incomplete.json").read_text())
    assert (found["complete"], found["missing"]) == (False, ["mamba2_fast, seed 1"])
    whole = json.loads((results / "recall.json").read_text())
    assert (whole["complete"], len(whole["runs"])) == (True, 5)
    assert whole["git"].keys() == {"revision", "dirty"}
    assert (results / "recall.png").stat().st_size > 10_000
