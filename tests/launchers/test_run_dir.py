"""Run directories: creating, refusing, revisions, and the records of an attempt."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from launchers import provenance
from launchers.run_dir import RunDir, RunDirectoryError
from pretrain.config.files import atomic_write_text, exclusive_write_text

TREE = {"run": {"name": "demo", "seed": 1}, "optimizer": {"betas": (0.9, 0.95), "eps": 1e-8}}


def test_frozen_tree_reads_back_with_every_bit(tmp_path: Path) -> None:
    tree = {"a": 0.1 + 0.2, "b": 1e-8, "c": None, "d": "1e3", "e": {"f": [1, True]}, "g": "ü"}
    run = RunDir.create(tree, path=tmp_path / "r")
    assert RunDir.open(run.path).config() == tree


def test_two_runs_of_one_name_and_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [RunDir.create(TREE, root=tmp_path, name="a/../b c") for _ in range(4)]
    assert len({run.path for run in runs}) == 4
    assert all(run.path.parent == tmp_path for run in runs)


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    run = RunDir.create(TREE, path=tmp_path / "r")
    before = run.config_path.read_bytes()
    other = {"run": {"name": "demo", "seed": 2}, "optimizer": TREE["optimizer"], "extra": 1}
    with pytest.raises(RunDirectoryError, match="another configuration") as caught:
        RunDir.create(other, path=run.path)
    message = str(caught.value)
    assert "run.seed: 1 -> 2" in message
    assert "extra" in message
    assert "betas" not in message
    assert f"pretrain resume {run.path}" in message
    assert run.config_path.read_bytes() == before


def test_the_same_configuration_opens_the_same_run(tmp_path: Path) -> None:
    first = RunDir.create(TREE, path=tmp_path / "r")
    again = RunDir.create(TREE, path=tmp_path / "r")
    assert first.created
    assert not again.created


def test_of_many_creators_of_one_path_one_freezes_and_none_overwrites(tmp_path: Path) -> None:
    results: list[object] = []
    gate = threading.Barrier(8)

    def create(seed: int) -> None:
        gate.wait()
        try:
            results.append((seed, RunDir.create({"seed": seed}, path=tmp_path / "r").created))
        except RunDirectoryError:
            results.append((seed, False))

    threads = [threading.Thread(target=create, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [seed for seed, created in results if created]
    assert len(results) == 8
    assert len(winners) == 1
    assert RunDir.open(tmp_path / "r").config() == {"seed": winners[0]}


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDir.create(TREE, path=tmp_path)
    with pytest.raises(RunDirectoryError, match="in the way"):
        RunDir.create(TREE, path=tmp_path / "thesis.tex" / "run")


def test_opening_names_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no such folder"):
        RunDir.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="a file; expected a run directory"):
        RunDir.open(tmp_path / "file")
    run = RunDir.create(TREE, root=tmp_path / "runs")
    with pytest.raises(RunDirectoryError, match="choose one") as caught:
        RunDir.open(tmp_path / "runs")
    assert str(run.path) in str(caught.value)


def test_revisions_are_numbered_and_the_highest_counts(run: RunDir) -> None:
    first = run.config()
    for number in range(1, 12):
        assert run.add_revision({"steps": number}, [f"steps: {number - 1} -> {number}", "two\nlines"]) == number
    assert run.revision() == 11
    assert run.config() == {"steps": 11}
    assert yaml.safe_load(run.config_path.read_text()) == first
    assert "# steps: 2 -> 3\n# two\n# lines\n" in (run.revisions_path / "0003.yaml").read_text()


def test_a_damaged_configuration_is_named(run: RunDir) -> None:
    run.config_path.write_text("a: [")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml"):
        run.config()


def test_attempts_append_commands_and_keep_the_first_records(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PRETRAIN_API_TOKEN", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@host/x")
    run.record_attempt(1, ["pretrain", "run", "run.name=a b"], source=run.path)
    first = (run.path / "environment.json").read_text()
    variables = json.loads(first)["variables"]
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["MLFLOW_TRACKING_URI"] == "https://***@host/x"
    assert "hunter2" not in first
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run.record_attempt(2, ["pretrain", "resume", "r"], source=run.path)
    lines = (run.path / "command.txt").read_text().splitlines()
    assert lines[1] == "pretrain run 'run.name=a b'"
    assert lines[3] == "pretrain resume r"
    assert (run.path / "environment.json").read_text() == first
    later = json.loads((run.attempt_path(2) / "environment.json").read_text())
    assert later["variables"]["OMP_NUM_THREADS"] == "7"
    assert not (run.attempt_path(2) / "git.json").exists()


def test_git_diff_restores_the_very_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True)

    repository = tmp_path / "code"
    repository.mkdir()
    git("init", "-q")
    (repository / "a.py").write_text("one\n")
    (repository / "b.bin").write_bytes(bytes(range(256)))
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "first")
    state, diff = provenance.git_state(repository)
    assert (state["dirty"], diff) == (False, "")
    (repository / "a.py").write_text("two\n")
    (repository / "b.bin").write_bytes(bytes(reversed(range(256))))
    (repository / "new file.py").write_text("x")
    state, diff = provenance.git_state(repository)
    assert state["dirty"]
    assert state["untracked"] == ["new file.py"]
    git("stash", "-q")
    (tmp_path / "git.diff").write_text(diff)
    git("apply", str(tmp_path / "git.diff"))
    assert (repository / "a.py").read_text() == "two\n"
    assert (repository / "b.bin").read_bytes() == bytes(reversed(range(256)))


def test_code_outside_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    state, diff = provenance.git_state(tmp_path)
    assert state["revision"] is None
    assert "git" in state["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path)[0]["revision"] is None
    assert diff == ""


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "latest"
    atomic_write_text(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_exclusive_write_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    exclusive_write_text(tmp_path / "a", "one")
    with pytest.raises(FileExistsError):
        exclusive_write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
