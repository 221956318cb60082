"""The manifest: both formats, appended shards and earlier editions, and what differs between two shard tables."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_sets import image_set, text_set, text_shard, write_manifest

from data_pipeline.errors import DamagedDataError
from data_pipeline.store.editions import appended, first_difference
from data_pipeline.store.manifest import Manifest, digest_of


def grown(folder: Path, times: int, with_bytes: bool = True) -> list[Manifest]:
    """A text set and its states after each of ``times`` additions of one or two shards."""
    states = [text_set(folder, shards=2, blocks=2, with_bytes=with_bytes)]
    for time in range(times):
        count = len(states[-1].split("train")["shards"])
        new = [text_shard(folder, f"train-{count + n:06d}.tar", 100 + count + n, 1) for n in range(1 + time % 2)]
        states.append(write_manifest(folder, appended(states[-1], new), "pretrain-text-blocks"))
    return states


def test_kinds(tmp_path: Path) -> None:
    text, images = text_set(tmp_path / "text"), image_set(tmp_path / "images")
    assert (text.kind, images.kind) == ("text", "images")
    assert text.splits == ("train", "validation")
    assert images.splits == ("train",)
    assert [sample.key for sample in images.samples("train")] == [f"{n:06d}" for n in range(9)]
    assert images.samples("train")[4].attributes == {"width": 20, "height": 24}
    assert images.samples("train")[4].header_name("jpg") == "000004.jpg"
    with pytest.raises(ValueError, match="without a tokenizer"):
        images.tokenizer_bytes()


@pytest.mark.parametrize("with_bytes", [True, False])
def test_every_earlier_edition_comes_back_exactly(tmp_path: Path, with_bytes: bool) -> None:
    states = grown(tmp_path / "set", 3, with_bytes)
    last = states[-1]
    assert len({state.fingerprint for state in states}) == 4
    assert [entry["fingerprint"] for entry in last.content["editions"]] == [s.fingerprint for s in states[:-1]]
    for state in states:
        again = last.edition(state.fingerprint)
        assert again.content == state.content
        assert again.fingerprint == digest_of(again.content) == state.fingerprint
        assert [block.key for block in again.blocks("train")] == [block.key for block in state.blocks("train")]
    for entry in last.split("train"), last.split("validation"):
        for count in ("documents", "tokens", "blocks"):
            assert entry[count] == sum(shard[count] for shard in entry["shards"])


def test_appending_changes_neither_argument(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    shard = text_shard(manifest.folder, "train-000003.tar", 50, 1)
    before = copy.deepcopy((manifest.content, shard))
    content = appended(manifest, [shard])
    assert (manifest.content, shard) == before
    content["splits"]["train"]["shards"][-1]["name"] = "other"
    assert shard == before[1]


def test_other_fingerprint_is_refused_and_the_first_difference_named(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    then = manifest.shard_table()
    then[1] = then[1] | {"sidecar_hash": "0" * 32}
    with pytest.raises(ValueError, match=r"shard train-000001.tar \(number 1\) has changed.*What to do: ") as caught:
        manifest.edition("f" * 32, then)
    assert not isinstance(caught.value, DamagedDataError)
    with pytest.raises(ValueError, match="no shards were ever appended"):
        manifest.edition("f" * 32)


def test_edition_that_does_not_give_its_fingerprint_is_damage(tmp_path: Path) -> None:
    last = grown(tmp_path / "set", 1)[-1]
    last.content["editions"][0]["shards"]["train"] = 1
    with pytest.raises(DamagedDataError, match="cannot be rebuilt"):
        last.edition(last.content["editions"][0]["fingerprint"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.update(name="train-000000.tar"), "train-000000.tar is there already"),
        (lambda shard: shard.update(name="validation-000000.tar"), "validation-000000.tar is there already"),
        (lambda shard: shard.pop("tokens"), "has no tokens"),
        (lambda shard: shard.pop("sidecar_hash"), "has no sidecar_hash"),
        (lambda shard: shard.update(largest_id=50), "token id 50, outside the vocabulary of 50"),
    ],
)
def test_shards_that_do_not_fit_are_not_appended(tmp_path: Path, change: Any, message: str) -> None:
    manifest = text_set(tmp_path / "set")
    shard = text_shard(manifest.folder, "train-000003.tar", 50, 1)
    change(shard)
    with pytest.raises(ValueError, match=message):
        appended(manifest, [shard])
    with pytest.raises(ValueError, match="no new shards"):
        appended(manifest, [])


TABLE = [{"name": f"s{n}.tar", "sidecar_hash": f"h{n}"} for n in range(5)]
NEW = {"name": "new.tar", "sidecar_hash": "hnew"}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (TABLE, None),
        (TABLE[:-1], "s4.tar (number 4) is missing"),
        ([*TABLE, NEW], "new.tar (number 5) is added"),
        (TABLE[:2] + TABLE[3:], "s2.tar (number 2) is missing"),
        ([*TABLE[:2], NEW, *TABLE[2:]], "new.tar (number 2) is added before s2.tar"),
        ([TABLE[0], TABLE[2], TABLE[1], *TABLE[3:]], "reordered: number 1 was s1.tar, now it is s2.tar"),
        ([TABLE[0], TABLE[1] | {"sidecar_hash": "x"}, *TABLE[2:]], "s1.tar (number 1) has changed"),
        ([TABLE[0], TABLE[1] | {"name": "x.tar"}, *TABLE[2:]], "s1.tar (number 1) is renamed to x.tar"),
        ([TABLE[0], NEW, *TABLE[2:]], "s1.tar (number 1) is missing; new.tar stands in its place"),
        ([], "s0.tar (number 0) is missing"),
    ],
)
def test_first_difference(now: list[dict[str, str]], message: str | None) -> None:
    found = first_difference(TABLE, now)
    assert found == message if message is None else message in str(found)


@given(st.lists(st.integers(0, 6), unique=True), st.lists(st.integers(0, 6), unique=True), st.integers(0, 99))
@settings(deadline=None)
def test_a_difference_is_told_exactly_when_there_is_one(then: list[int], now: list[int], seed: int) -> None:
    rng = random.Random(seed)
    tables = [
        [{"name": f"{n}.tar", "sidecar_hash": f"{n}{rng.choice('ab')}"} for n in numbers] for numbers in (then, now)
    ]
    assert (first_difference(*tables) is None) == (tables[0] == tables[1])


def test_folder_of_a_url_is_an_error(tmp_path: Path) -> None:
    class Storage:
        url = "s3://bucket/set"

        def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
            return (folder / name).read_bytes()

    folder = text_set(tmp_path / "set").folder
    manifest = Manifest.load("s3://bucket/set", Storage())  # type: ignore[arg-type]
    assert manifest.location == "s3://bucket/set"
    assert manifest.tokenizer_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="not a local folder"):
        _ = manifest.folder


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    folder = text_set(tmp_path / "set").folder
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(tree | {"version": 2}))
    with pytest.raises(ValueError, match="version 2; this program reads"):
        Manifest.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="pretrain data prepare text"):
        Manifest.load(folder)
