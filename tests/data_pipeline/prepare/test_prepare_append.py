"""Appending: new training shards at the end, nothing else of the dataset changes, and a kill leaves it whole."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prepare_helpers import contents, random_texts, stored_documents, write_jsonl
from text_corpus import SMALL

from data_pipeline.baselines import document_texts
from data_pipeline.errors import DamagedDataError
from data_pipeline.prepare.text import PrepareReport, prepare_text
from data_pipeline.prepare.workspace import Task
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.verify import find_damage

ROOT = Path(__file__).parents[3]
TEXTS = random_texts(300)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A dataset of 150 documents in ``tmp_path / "out"``; the other 150 lie in ``new.jsonl``."""
    write_jsonl(tmp_path / "old.jsonl", TEXTS[:150])
    write_jsonl(tmp_path / "new.jsonl", TEXTS[150:])
    prepare_text(tmp_path / "old.jsonl", tmp_path / "out", options=SMALL, workers=1)
    return tmp_path / "out"


def append(source: Path, out: Path, **arguments: Any) -> PrepareReport:
    return prepare_text(source, out, append=True, **{"workers": 1, "piece_bytes": 3_000, **arguments})


SMALL_SHARDS = dataclasses.replace(SMALL, vocab_size=5_000, block_tokens=9, validation_fraction=0.5)
"""Options of which a dataset that is there leaves only the shard size and the seed."""


def test_append_adds_train_shards_and_changes_nothing_else(tmp_path: Path, out: Path) -> None:
    before, old = contents(out), Manifest.load(out)
    report = append(tmp_path / "new.jsonl", out, options=SMALL_SHARDS)
    after, new = contents(out), report.manifest
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    shards = [shard["name"] for shard in new.split("train")["shards"]]
    old_shards = [shard["name"] for shard in old.split("train")["shards"]]
    assert shards[: len(old_shards)] == old_shards
    assert shards == [f"train-{number:06d}.tar" for number in range(len(shards))]
    assert len(shards) > len(old_shards) + 1
    assert new.split("validation") == old.split("validation")
    assert new.content["block_tokens"] == old.content["block_tokens"]
    added = stored_documents(new, "train")[old.split("train")["documents"] :]
    assert len(added) == 150
    texts = [text.decode() for text in document_texts(new, "train")][old.split("train")["documents"] :]
    assert sorted(texts) == sorted(TEXTS[150:])
    assert texts != TEXTS[150:]
    assert find_damage(out) == []
    assert len({block.key for block in new.blocks("train")}) == len(new.blocks("train"))
    # The dataset as it was is still there, exactly.
    assert new.edition(old.fingerprint).content == old.content
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["new.jsonl", "old.jsonl", "out"]


def test_same_append_again_does_nothing_and_another_adds(tmp_path: Path, out: Path) -> None:
    first = append(tmp_path / "new.jsonl", out).manifest
    again = append(tmp_path / "new.jsonl", out)
    assert again.reused
    assert again.manifest.fingerprint == first.fingerprint
    write_jsonl(tmp_path / "third.jsonl", ["one more", "and another"])
    third = append(tmp_path / "third.jsonl", out).manifest
    assert third.split("train")["documents"] == first.split("train")["documents"] + 2
    assert [len(third.edition(e["fingerprint"]).content.get("editions", [])) for e in third.content["editions"]] == [
        0,
        1,
    ]
    assert [entry["corpus"] for entry in third.origin["appended"]] == ["new.jsonl", "third.jsonl"]


def test_held_out_documents_are_never_appended(tmp_path: Path, out: Path) -> None:
    held = [text.decode() for text in document_texts(Manifest.load(out), "validation")]
    assert len(held) > 5
    write_jsonl(tmp_path / "mixed.jsonl", held + TEXTS[150:170])
    manifest = append(tmp_path / "mixed.jsonl", out).manifest
    assert manifest.origin["appended"][0]["dropped"] == {"equal to a held-out document": len(held)}
    train = {text.decode() for text in document_texts(manifest, "train")}
    assert not train & set(held)
    assert set(TEXTS[150:170]) <= train


@pytest.mark.parametrize("count", [1, 3])
def test_append_killed_while_it_moves_shards_leaves_a_whole_dataset(tmp_path: Path, out: Path, count: int) -> None:
    before = Manifest.load(out)
    script = (
        "import os, signal\n"
        "from data_pipeline.prepare.text import PrepareOptions, prepare_text\n"
        "replace, left = os.replace, [0]\n"
        "def killing(source, target):\n"
        "    replace(source, target)\n"
        f"    left[0] += str(target).startswith({str(out)!r} + '/')\n"
        f"    if left[0] == {count}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = killing\n"
        f"prepare_text({str(tmp_path / 'new.jsonl')!r}, {str(out)!r}, append=True,\n"
        f"             options={SMALL_SHARDS!r}, workers=1)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    half = Manifest.load(out)
    assert half.fingerprint == before.fingerprint
    assert find_damage(out) == []
    report = append(tmp_path / "new.jsonl", out, options=SMALL_SHARDS)
    assert report.counts.documents == 0
    # The same as without a kill.
    copy = tmp_path / "copy"
    prepare_text(tmp_path / "old.jsonl", copy, options=SMALL, workers=1)
    append(tmp_path / "new.jsonl", copy, options=SMALL_SHARDS)
    assert contents(out) == contents(copy)
    assert not (tmp_path / ".out.preparing").exists()


def test_tasks_may_append(tmp_path: Path, out: Path) -> None:
    from data_pipeline.prepare.text import UnfinishedTasksError

    rounds = 0
    while not Manifest.load(out).content.get("editions"):
        for index in range(2):
            try:
                append(tmp_path / "new.jsonl", out, task=Task(index, 2))
            except UnfinishedTasksError:
                rounds += 1
    assert rounds == 2
    assert Manifest.load(out).split("train")["documents"] + Manifest.load(out).split("validation")["documents"] == 300
    assert append(tmp_path / "new.jsonl", out, task=Task(1, 2)).reused


def test_append_needs_a_sound_dataset_of_text(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="is not a prepared dataset"):
        append(tmp_path / "new.jsonl", tmp_path / "absent")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises((ValueError, DamagedDataError), match=r"tokenizer.json does not match its hash"):
        append(tmp_path / "new.jsonl", out)
