"""Data sets before a run: shards, sidecars, manifest, tokenizer, identity, all without reading a shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_text import VOCABULARY

from data_pipeline.config import TextDataConfig
from data_pipeline.store import presence
from data_pipeline.store.manifest import Manifest, digest_of
from launchers.run_dir import RunDir
from pretrain.config.schema import TrainConfig
from pretrain.models.hybrid.config import HybridConfig
from pretrain.planning.preflight import data, vocabulary
from pretrain.planning.preflight.findings import Finding, Level
from pretrain.planning.preflight.subject import Subject


@pytest.fixture
def copy(data_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_path, tmp_path / "data"))


def _faults(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level in (Level.ERROR, Level.WARNING)]


def test_a_sound_data_set(subject: Callable[..., Subject], data_path: Path) -> None:
    found = list(data.check(subject(data=TextDataConfig(path=str(data_path), sequence_length=32))))
    assert not _faults(found)
    assert found[0].figures["shards"] == found[0].figures["sized"] == 2
    assert "epochs" in found[1].figures


def _damage(folder: Path, how: str) -> None:
    shard = next(folder.glob("train-*.tar"))
    sidecar = shard.with_suffix(".json")
    if how == "shard missing":
        shard.unlink()
    elif how == "shard cut short":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif how == "sidecar missing":
        sidecar.unlink()
    elif how == "sidecar changed":
        sidecar.write_text(sidecar.read_text() + " ")
    else:
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "how", ["shard missing", "shard cut short", "sidecar missing", "sidecar changed", "tokenizer changed"]
)
def test_damage_is_named(subject: Callable[..., Subject], copy: Path, how: str) -> None:
    _damage(copy, how)
    faults = _faults(list(data.check(subject(data=TextDataConfig(path=str(copy), sequence_length=32)))))
    assert [fault.level for fault in faults] == [Level.ERROR]
    assert ("tokenizer.json" if how.startswith("tokenizer") else "train-") in faults[0].found


def test_damage_that_training_substitutes_is_a_warning(subject: Callable[..., Subject], copy: Path) -> None:
    _damage(copy, "shard cut short")
    config = TextDataConfig(path=str(copy), sequence_length=32, on_damage="substitute")
    assert [fault.level for fault in _faults(list(data.check(subject(data=config))))] == [Level.WARNING]


def test_of_many_shards_those_chosen_are_spread_evenly(copy: Path) -> None:
    assert presence.evenly(range(1000), 3) == [0, 500, 999]
    assert presence.evenly(range(3), 3) == [0, 1, 2]
    found = presence.look(Manifest.load(copy), most_sized=1, most_sidecars=1)
    assert (found.shards, found.sized, found.sidecars) == (2, 1, 1)


def test_a_run_goes_on_with_the_data_it_began_with(subject: Callable[..., Subject], copy: Path, tmp_path: Path) -> None:
    config = TextDataConfig(path=str(copy), sequence_length=32)
    run = RunDir.create({"run": {}}, path=tmp_path / "run")
    run.check_datasets(config.datasets())
    assert not _faults(list(data.check(subject(run=run, data=config))))
    tree = json.loads((copy / "manifest.json").read_text())
    tree["content"]["num_lanes"] += 1
    (copy / "manifest.json").write_text(json.dumps(tree | {"fingerprint": digest_of(tree["content"])}))
    (fault,) = _faults(list(data.check(subject(run=run, data=config))))
    assert fault.level is Level.ERROR
    assert "created on other data" in fault.found


def _rows(rows: int) -> HybridConfig:
    return HybridConfig(pattern="M-", width=64, vocab_size=rows)


@pytest.mark.parametrize(("rows", "level"), [(VOCABULARY, Level.OK), (10 * VOCABULARY, Level.WARNING)])
def test_the_tokenizer_is_counted(subject: Callable[..., Subject], data_path: Path, rows: int, level: Level) -> None:
    made = subject(data=TextDataConfig(path=str(data_path), sequence_length=32), model=_rows(rows))
    (found,) = vocabulary.check(made)
    assert (found.level, found.figures["ids"]) == (level, VOCABULARY)


def test_ids_in_shards_beyond_the_model(subject: Callable[..., Subject], data_path: Path) -> None:
    made = subject(data=TextDataConfig(path=str(data_path), sequence_length=32), model=_rows(100))
    faults = _faults(list(vocabulary.check(made)))
    assert [fault.what for fault in faults] == ["token ids of text"]


def test_weights_of_another_tokenizer(subject: Callable[..., Subject], data_path: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((data_path / "tokenizer.json").read_text())
    vocabulary_of_it = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary_of_it, key=vocabulary_of_it.get)[50:52]
    config = TextDataConfig(path=str(data_path), sequence_length=32)
    train = TrainConfig(init_from=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not _faults(list(vocabulary.check(subject(data=config, model=_rows(VOCABULARY), train=train))))
    vocabulary_of_it[first], vocabulary_of_it[second] = vocabulary_of_it[second], vocabulary_of_it[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (fault,) = _faults(list(vocabulary.check(subject(data=config, model=_rows(VOCABULARY), train=train))))
    assert (fault.level, fault.what) == (Level.ERROR, "train.init_from")
