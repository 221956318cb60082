"""A rollback that was written down but not carried out is carried out by the next start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import pretrain, same_tensors
from support.faults import fault, faulty

from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError, Manifest
from pretrain.checkpoint.store import CheckpointStore
from pretrain.training.rollback import Rollback, finish_rollback

GLOBAL_BATCH = 4
BACK = {"step": 6, "action": "rollback", "skipped": [4, 5], "to_step": 4}


def checkpoint(store: CheckpointStore, step: int, batches: int, skipped: tuple[int, ...] = ()) -> None:
    folder = store.path(step)
    folder.mkdir(parents=True)
    training = {"step": step, "samples": batches * GLOBAL_BATCH, "tokens": 1, "skipped": list(skipped)}
    (folder / MANIFEST_NAME).write_text(Manifest(step, {}, {}, training).to_json())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "checkpoints")
    for step in (2, 4, 5):
        checkpoint(made, step, step)
    return made


def finish(store: CheckpointStore, choice: str | None, *events: dict[str, Any]) -> str | None:
    return finish_rollback(store, choice, events, GLOBAL_BATCH, attempt=2, fence=lambda: None)


@pytest.mark.parametrize("choice", [None, "latest", "step_00000005", "5"])
def test_a_checkpoint_that_was_to_be_left_is_left(store: CheckpointStore, choice: str | None) -> None:
    assert finish(store, choice, BACK) == "step_00000004"
    assert store.steps() == [2, 4]
    assert (store.root / "set_aside_0002" / "step_00000005").is_dir()
    assert finish(store, None, BACK) is None, "there is nothing left to do"


def test_what_was_moved_half_way_is_moved(store: CheckpointStore) -> None:
    (store.root / "latest").write_text("step_00000004\n")
    assert finish(store, None, BACK) is None
    assert store.steps() == [2, 4]


def test_checkpoints_of_the_history_that_counts_stay(store: CheckpointStore) -> None:
    shutil.rmtree(store.path(5))
    checkpoint(store, 5, 7, skipped=(4, 5))
    skipped = {"step": 3, "action": "skip", "skipped": [2]}
    assert finish(store, None, BACK, skipped) is None
    assert store.steps() == [2, 4, 5]


def test_without_the_checkpoint_to_go_back_to_nothing_is_touched(store: CheckpointStore) -> None:
    shutil.rmtree(store.path(4))
    with pytest.raises(
        CheckpointError, match=r"left out at bad step 6 by going back to step_00000004; that is missing"
    ):
        finish(store, None, BACK)
    assert store.steps() == [2, 5]
    assert finish(store, "2", BACK) == "2"


def test_a_checkpoint_from_which_no_step_went_well_is_taken_last(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.parallel.process import ProcessEnvironment
    from pretrain.training import rollback

    monkeypatch.setattr(rollback, "gather_objects", lambda value: [value])
    monkeypatch.setattr(rollback, "hash_faults", lambda folder, env: [])
    env = ProcessEnvironment(0, 1, 0, 0, 1, "127.0.0.1", 1, 1)
    back = Rollback(store, env, attempt=1, fence=lambda: None)
    steps = [getattr(back.plan([5], GLOBAL_BATCH, doubtful), "step", None) for doubtful in (None, 5, 4)]
    assert steps == [5, 4, 5]
    for step in (2, 4):
        shutil.rmtree(store.path(step))
    assert getattr(back.plan([5], GLOBAL_BATCH, 5), "step", None) == 5


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_that_dies_between_record_and_return_ends_as_one_that_does_not(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *("launcher.num_processes=2", "train.eval_interval=0", "train.checkpoint_interval=1"),
        *("health.on_nonfinite=rollback", "health.skip_window=2", "tracking.enabled=false"),
        *faulty(fault("not_a_number", step=6, rank=0)),
    ]
    clean, told = start("clean", *options)
    assert clean.returncode == 0, clean.stdout + clean.stderr

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\nfrom pretrain.checkpoint.store import CheckpointStore\n"
        "CheckpointStore.set_aside = lambda *arguments: os._exit(1)\n"
    )
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path / "site"))
        died, run = start("died", *options)
    assert died.returncode == 1, died.stdout + died.stderr
    assert (run.path / "checkpoints" / "step_00000005").is_dir()
    resumed = pretrain("resume", run.path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going back to step 4 had not been finished" in (run.path / "logs/attempt_0002/rank_00000.log").read_text()
    assert run.losses() == told.losses()
    assert same_tensors(run.tensors(8), told.tensors(8)) == []
