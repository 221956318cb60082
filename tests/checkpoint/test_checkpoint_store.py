"""Checkpoint folders: atomic commit, choice of the newest whole one, damage named, pruning."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.damage import describe_damage
from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.manifest import CheckpointError, CheckpointSaveError, CorruptCheckpointError, Manifest
from pretrain.checkpoint.rank_file import write_rank_file
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore, verify
from pretrain.checkpoint.writer import Save
from pretrain.parallel.shard import Shard


def fragments(step: int) -> list[Fragment]:
    values = torch.arange(12.0) + step
    return [
        Fragment("a.weight", "master", (3, 4), 0, values[:5], Shard.whole((3, 4))),
        Fragment("a.weight", "master", (3, 4), 5, values[5:], Shard.whole((3, 4))),
        Fragment("b", "weight", (2,), 0, torch.tensor([1.5, -2.0], dtype=torch.bfloat16), Shard.whole((2,))),
    ]


def save(root: Path, step: int, parts: list[Fragment] | None = None, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "step": step,
        "attempt": 1,
        "rank": 0,
        "gather": lambda value: [value],
        "fence": lambda: None,
    }
    return Save(CheckpointStore(root), **(arguments | changes)).write(parts or fragments(step), {"step": step}).path


def test_round_trip_reads_any_range(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 7))
    assert torch.equal(reader.tensor("a.weight", "master"), (torch.arange(12.0) + 7).reshape(3, 4))
    assert torch.equal(reader.read("a.weight", "master", 3, 9), torch.arange(3.0, 9.0) + 7)
    assert reader.tensor("b", "weight").dtype == torch.bfloat16
    assert reader.training == {"step": 7}


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path, 0) / "rank_00000.safetensors")
    assert torch.equal(stored["master:a.weight:5"], torch.arange(5.0, 12.0))


@pytest.mark.parametrize(
    "parts",
    [
        fragments(0)[:1],
        [*fragments(0), Fragment("a.weight", "master", (3, 4), 4, torch.ones(1), Shard.whole((3, 4)))],
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path: Path, parts: list[Fragment]) -> None:
    with pytest.raises(CheckpointSaveError, match=r"master:a\.weight"):
        save(tmp_path, 1, parts)
    assert CheckpointStore(tmp_path).latest() is None
    assert not list(tmp_path.iterdir())


def test_a_save_that_dies_midway_is_never_chosen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    store = CheckpointStore(tmp_path)
    # What a killed process leaves: a temporary folder with some rank files, perhaps even a manifest.
    torn = store.temporary_path(2, 1)
    torn.mkdir()
    write_rank_file(torn / "rank_00000.safetensors", fragments(2)[:1])
    assert store.latest() == store.path(1)
    assert store.steps() == [1]
    assert store.sweep() == [torn.name]
    assert not torn.exists()


def save_and_die(root: Path, step: int, moment: str) -> None:
    """Child process: dies by SIGKILL at a chosen moment of a real save."""
    from pretrain.checkpoint import store, writer

    owner, name = {
        "rank file written": (writer, "_merge"),
        "manifest written": (store.CheckpointStore, "commit"),
        "renamed": (store, "atomic_write_text"),
    }[moment]
    setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    save(root, step)


@pytest.mark.parametrize(("moment", "newest"), [("rank file written", 1), ("manifest written", 1), ("renamed", 2)])
def test_a_killed_save_leaves_a_whole_checkpoint_to_choose(tmp_path: Path, moment: str, newest: int) -> None:
    save(tmp_path, 1)
    process = multiprocessing.get_context("spawn").Process(target=save_and_die, args=(tmp_path, 2, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = CheckpointStore(tmp_path)
    # Killed between the rename and the pointer: step 2 is whole but the pointer, which is what counts, is at step 1.
    assert store.steps() == list(range(1, newest + 1))
    assert store.latest() == store.path(1)
    verify(store.path(newest))
    store.sweep()
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_stale_pointer_falls_back_to_the_newest_folder(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    store = CheckpointStore(tmp_path)
    (tmp_path / "latest").write_text("step_00000009\n")
    assert store.latest() == store.path(2)
    (tmp_path / "latest").unlink()
    assert store.latest() == store.path(2)


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    again = save(tmp_path, 1, fragments(100))
    assert torch.equal(CheckpointReader(again).read("a.weight", "master", 0, 2), torch.tensor([100.0, 101.0]))
    assert CheckpointStore(tmp_path).steps() == [1]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_a_failing_rank_fails_all_and_keeps_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def second_rank_has_a_full_disk(value: Any) -> list[Any]:
        return [value, (None, "OSError: [Errno 28] No space left on device")]

    with pytest.raises(CheckpointSaveError, match=r"rank 1: OSError: \[Errno 28\]"):
        save(tmp_path, 2, gather=second_rank_has_a_full_disk)
    assert CheckpointStore(tmp_path).steps() == [1]
    verify(CheckpointStore(tmp_path).path(1))


def test_a_fenced_writer_commits_nothing(tmp_path: Path) -> None:
    calls = []

    def fence() -> None:
        calls.append(1)
        if len(calls) == 2:  # the lease is lost between writing and committing
            raise RuntimeError("lost to attempt 2")

    with pytest.raises(CheckpointSaveError, match="lost to attempt 2"):
        save(tmp_path, 1, fence=fence)
    assert CheckpointStore(tmp_path).steps() == []


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rank_00000.safetensors", damage_byte, "rank_00000.safetensors: hash"),
        ("rank_00000.safetensors", lambda path: os.truncate(path, 50), "50 bytes, expected"),
        ("rank_00000.safetensors", Path.unlink, "rank_00000.safetensors: missing"),
        ("manifest.json", damage_byte, "manifest.json"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", lambda path: path.write_text("{"), "cannot be read"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_offered(
    tmp_path: Path, name: str, damage: Any, message: str
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder / name)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        verify(folder)
    text = describe_damage(CheckpointStore(tmp_path), folder, [str(caught.value)])
    assert "--checkpoint step_00000001" in text


def test_files_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    # The same names, the same sizes, another step's content.
    shutil.copy(tmp_path / "step_00000001/rank_00000.safetensors", folder)
    with pytest.raises(CorruptCheckpointError, match=r"step_00000002 is damaged: rank_00000\.safetensors: hash"):
        verify(folder)
    shutil.copy(tmp_path / "step_00000001/manifest.json", folder)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is of step 1, in a folder of step 2"):
        verify(folder)


def test_a_file_without_what_the_manifest_says_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    write_rank_file(folder / "rank_00000.safetensors", fragments(1)[:1])
    reader = CheckpointReader(folder)
    with pytest.raises(CorruptCheckpointError, match=r"rank_00000\.safetensors does not hold master:a\.weight:5"):
        reader.tensor("a.weight", "master")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    with pytest.raises(CorruptCheckpointError, match="format version 3 found, this release reads 1 and 2"):
        Manifest.load(folder)


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (20, 25, 30):
        save(tmp_path, step)
    store = CheckpointStore(tmp_path)
    assert store.set_aside(20, attempt=3) == ["step_00000025", "step_00000030"]
    assert (store.steps(), store.latest()) == ([20], store.path(20))
    verify(tmp_path / "set_aside_0003" / "step_00000030")
    # The new history may be pruned to one checkpoint without losing it to a higher number of the old one.
    save(tmp_path, 25)
    assert store.prune(1) == [20]
    assert store.latest() == store.path(25)
    assert store.set_aside(25, attempt=4) == []
    assert not (tmp_path / "set_aside_0004").exists()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    store = CheckpointStore(tmp_path)
    assert store.prune(2) == [1, 2]
    assert store.steps() == [3, 4]
    assert store.prune(0) == []
    with pytest.raises(CheckpointError, match="existing: step_00000003, step_00000004"):
        store.select("1")
    assert store.select("3") == store.path(3)


def test_policies_keep_more_than_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, 1.5), (60, 4.0), (70, 5.0)):
        save(tmp_path, step)
        store.record_score(step, loss)
    store.record_score(65, 0.5)  # validated, not saved
    assert store.prune(1, every=30, best=2) == [10, 40]
    # 70 is the newest, 30 and 60 are multiples of 30, 20 and 50 have the lowest losses.
    assert store.steps() == [20, 30, 50, 60, 70]
    # A later, better one takes the place of the second best.
    save(tmp_path, 80)
    CheckpointStore(tmp_path).record_score(80, 1.2)
    assert CheckpointStore(tmp_path).prune(1, every=0, best=2) == [30, 50, 60, 70]
    assert store.steps() == [20, 80]


def test_the_latest_is_never_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    # Killed between the rename of step 3 and the pointer: step 1 may be what the next start continues from.
    (tmp_path / "latest").write_text("step_00000001\n")
    assert CheckpointStore(tmp_path).prune(1) == [2]
    assert CheckpointStore(tmp_path).steps() == [1, 3]


def test_going_back_forgets_the_scores_of_the_history_it_leaves(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        save(tmp_path, step)
        store.record_score(step, 1 / step)
    store.set_aside(10, attempt=2)
    assert store.scores() == {10: 0.1}


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "scores.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"scores\.json is damaged"):
        CheckpointStore(tmp_path).prune(1, best=1)
    assert CheckpointStore(tmp_path).steps() == [1, 2]
