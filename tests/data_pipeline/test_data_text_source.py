"""Rows of text: what a model would see, compared with the documents themselves."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import plan as plan_module
from data_pipeline.baselines import document_texts
from data_pipeline.config import TextDataConfig
from data_pipeline.plan import blocks_per_segment
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader
from data_pipeline.text_build import sequential_source, train_source
from data_pipeline.text_source import TextSource

Stored = dict[tuple[str, str, int], np.ndarray]


def stored_documents(manifest: Manifest, split: str) -> Stored:
    """Tokens of every document by (shard, member, number in the member)."""
    reader = BlockReader(manifest, manifest.blocks(split))
    documents: Stored = {}
    for index, block in enumerate(reader.blocks):
        arrays = reader.read(index)
        for number, tokens in enumerate(np.split(arrays.tokens, arrays.offsets[1:-1])):
            documents[block.shard, f"{block.key}.tok.npy", number] = tokens
    return documents


def check_row(source: TextSource, index: int, documents: Stored) -> Counter:
    """Compare one row with the documents it says it holds; returns the targets covered."""
    batch = source.batch([index])
    row = {name: array[0] for name, array in batch.items() if array.ndim == 2}
    borders = batch["cu_seqlens"].tolist()
    assert (borders[0], borders[-1]) == (0, len(row["tokens"]))
    assert batch["max_seqlen"] == max(np.diff(borders))
    covered: Counter = Counter()
    at = 0
    for number, piece in enumerate(source.provenance(index)):
        key = piece["shard"], piece["member"], piece["document"]
        first, length = piece["first_token"], piece["positions"]
        document = documents[key]
        np.testing.assert_array_equal(row["tokens"][at : at + length], document[first : first + length])
        np.testing.assert_array_equal(row["targets"][at : at + length], document[first + 1 : first + 1 + length])
        assert (row["seq_idx"][at : at + length] == number).all()
        assert row["position_ids"][at : at + length].tolist() == list(range(length))
        covered.update((key, token) for token in range(first + 1, first + 1 + length))
        assert borders[number] == at
        at += length
    assert row["loss_mask"].tolist() == [True] * at + [False] * (len(row["tokens"]) - at)
    assert (row["seq_idx"][at:] == -1).all()
    return covered


def all_targets(documents: Stored) -> Counter:
    return Counter((key, token) for key, tokens in documents.items() for token in range(1, len(tokens)))


@pytest.mark.parametrize("sequence_length", [2, 17, 64, 1024])
def test_validation_holds_every_target_once(dataset: Path, sequence_length: int) -> None:
    manifest = Manifest.load(dataset)
    source = sequential_source(manifest, sequence_length)
    documents = stored_documents(manifest, "validation")
    assert len(documents) > 2
    assert source.num_samples is not None
    covered: Counter = Counter()
    for index in range(source.num_samples):
        covered += check_row(source, index, documents)
    assert covered == all_targets(documents)
    assert source.num_bytes == sum(map(len, document_texts(manifest, "validation")))
    with pytest.raises(IndexError):
        source.batch([source.num_samples])


@pytest.mark.parametrize(("sequence_length", "lanes"), [(16, 3), (33, 1), (200, 2)])
def test_an_epoch_of_all_lanes_holds_every_target_once(dataset: Path, sequence_length: int, lanes: int) -> None:
    manifest = Manifest.load(dataset)
    source = train_source(manifest, sequence_length, lanes, seed=5)
    documents = stored_documents(manifest, "train")
    covered: dict[int, Counter] = {0: Counter(), 1: Counter()}
    for lane in range(lanes):
        index = lane
        while (epoch := source.provenance(index)[0]["epoch"]) < 2:
            covered[epoch] += check_row(source, index, documents)
            index += lanes
    assert covered[0] == covered[1] == all_targets(documents)


@settings(max_examples=10)
@given(start=st.integers(0, 300), rng=st.randoms())
def test_a_row_depends_on_its_index_alone(dataset: Path, start: int, rng) -> None:
    manifest = Manifest.load(dataset)
    whole = train_source(manifest, 24, 2, seed=5).batch(range(400))
    later = train_source(manifest, 24, 2, seed=5)
    indices = list(range(start, start + 60))
    for _ in range(2):
        for name, array in later.batch(indices).items():
            if array.ndim == 2:
                np.testing.assert_array_equal(array, whole[name][indices])
        rng.shuffle(indices)


def test_walking_forwards_packs_each_segment_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = train_source(Manifest.load(dataset), 24, 2, seed=5)
    opened = []
    inner = source._opener.open
    monkeypatch.setattr(source._opener, "open", lambda *visit: opened.append(visit[:2]) or inner(*visit))
    for index in range(0, 400, 4):
        source.batch(range(index, index + 4))
    assert len(opened) > 10
    assert len(opened) == len(set(opened))


def test_plan_is_cached_and_a_torn_cache_is_only_a_miss(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("plan_*")))
    expected = train_source(Manifest.load(folder), 24, 2, seed=5).batch(range(40))
    (cache,) = folder.glob("plan_*.npz")
    cache.write_bytes(cache.read_bytes()[:50])
    torn = train_source(Manifest.load(folder), 24, 2, seed=5).batch(range(40))
    np.testing.assert_array_equal(torn["tokens"], expected["tokens"])
    monkeypatch.setattr(plan_module, "count_rows", lambda *_: pytest.fail("planned again"))
    cached = train_source(Manifest.load(folder), 24, 2, seed=5).batch(range(40))
    np.testing.assert_array_equal(cached["tokens"], expected["tokens"])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_plan_does_without_a_writable_folder(dataset: Path, tmp_path: Path, monkeypatch) -> None:
    folder = Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("plan_*")))

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(np, "savez", refuse)
    assert train_source(Manifest.load(folder), 24, 2, seed=5).batch([0])["loss_mask"].any()
    assert not list(folder.glob("plan_*"))


def test_fingerprint_covers_what_the_order_depends_on(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    base = train_source(manifest, 24, 2, seed=5).fingerprint
    assert base == train_source(manifest, 24, 2, seed=5).fingerprint
    others = {
        train_source(manifest, 25, 2, seed=5).fingerprint,
        train_source(manifest, 24, 3, seed=5).fingerprint,
        train_source(manifest, 24, 2, seed=6).fingerprint,
    }
    assert len(others | {base}) == 4


@pytest.mark.parametrize(
    ("blocks", "block_tokens", "sequence_length", "lanes", "expected"),
    [
        (84, 32_768, 512, 16, 1),  # small set: lanes before packing window
        (84, 32_768, 512, 2, 8),  # fewer lanes leave room for the full window
        (10**6, 1 << 20, 4096, 1024, 2),
        (3, 4096, 8192, 1, 1),
    ],
)
def test_segment_size(blocks: int, block_tokens: int, sequence_length: int, lanes: int, expected: int) -> None:
    assert blocks_per_segment(blocks, block_tokens, sequence_length, lanes) == expected


def test_config_builds_both_sources(dataset: Path) -> None:
    config = TextDataConfig(path=str(dataset), sequence_length=24)
    assert list(config.violations()) == []
    assert config.vocab_size == 300
    sources = config.build(seed=1)
    assert sources.train.num_samples is None
    assert sources.train.num_bytes is None
    assert sources.validation is not None
    assert sources.tokenizer_path == str(dataset / "tokenizer.json")
    batch = sources.train.batch([0, 1, 2])
    kinds = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert kinds == {
        "tokens": ("int32", (3, 24)),
        "targets": ("int32", (3, 24)),
        "loss_mask": ("bool", (3, 24)),
        "seq_idx": ("int32", (3, 24)),
        "position_ids": ("int32", (3, 24)),
        "cu_seqlens": ("int32", (len(batch["cu_seqlens"]),)),
        "max_seqlen": ("int32", ()),
    }


def test_config_reports_all_violations(dataset: Path, tmp_path: Path) -> None:
    missing = TextDataConfig(path=str(tmp_path / "none"), sequence_length=1, num_lanes=0)
    found = {field: (rule, fix) for field, _, rule, fix in missing.violations()}
    assert set(found) == {"path", "sequence_length", "num_lanes"}
    assert "pretrain data prepare stdlib" in found["path"][1]
    crowded = TextDataConfig(path=str(dataset), sequence_length=24, num_lanes=10_000)
    assert [field for field, *_ in crowded.violations()] == ["num_lanes"]
