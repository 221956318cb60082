"""The order of documents is one global shuffle, the tokens are those of the library, blocks are whole documents."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare_helpers import random_texts, stored_documents, write_jsonl
from text_corpus import SMALL
from tokenizers import Tokenizer

import data_pipeline.prepare.survey as survey_module
from data_pipeline.baselines import document_texts
from data_pipeline.prepare import keys
from data_pipeline.prepare.text import prepare_text
from data_pipeline.prepare.writer import block_ends
from data_pipeline.store.manifest import Manifest


def train_numbers(manifest: Manifest) -> list[int]:
    """The number that each document of :func:`random_texts` starts with, in stored order."""
    return [int(text.split()[0]) for text in document_texts(manifest, "train")]


def prepare_jsonl(folder: Path, texts: list[str], **arguments: Any) -> Manifest:
    write_jsonl(folder / "a.jsonl", texts)
    return prepare_text(folder / "a.jsonl", folder / "out", **{"workers": 1, **arguments}).manifest


def test_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    texts = [*random_texts(150), "<|eos|> is text <|bos|>", "\u00e9 e\u0301 \u6771 \U0001f600", " \n\n\t x"]
    manifest = prepare_jsonl(tmp_path, texts, options=SMALL, piece_bytes=2_000)
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    tokenizer.encode_special_tokens = True
    expected = sorted(tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    assert sorted(d for split in manifest.splits for d in stored_documents(manifest, split)) == expected


def test_shards_are_a_global_uniform_shuffle(tmp_path: Path) -> None:
    """Where a document stands tells nothing about where it stood in the input. Bounds are 5 standard deviations,
    and the seed is fixed."""
    count = 4_000
    options = dataclasses.replace(SMALL, validation_fraction=0, shard_bytes=40_000)
    manifest = prepare_jsonl(tmp_path, random_texts(count), options=options, piece_bytes=60_000)
    order = np.array(train_numbers(manifest))
    assert sorted(order.tolist()) == list(range(count))
    shards = [shard["documents"] for shard in manifest.split("train")["shards"]]
    assert len(shards) > 8
    # Rank correlation with the input: mean 0, standard deviation 1 / sqrt(n).
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 5 / np.sqrt(count)
    # Neighbours in the store were neighbours (within 40) in the input as often as by chance: 2 * 40 / n.
    near = (np.abs(np.diff(order)) <= 40).sum()
    mean = 80.0
    assert abs(near - mean) < 5 * np.sqrt(mean)
    # Every shard draws its documents from all quarters of the input alike: chi-square, mean = degrees of freedom.
    tables = [np.bincount(part * 4 // count, minlength=4) for part in np.split(order, np.cumsum(shards)[:-1])]
    expected = np.array(shards)[:, None] / 4
    chi_square = ((np.array(tables) - expected) ** 2 / expected).sum()
    freedom = 3 * len(shards)
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    # Shards themselves are of equal size, within the deviation of a binomial.
    assert np.abs(np.array(shards) - count / len(shards)).max() < 5 * np.sqrt(count / len(shards))


def test_equal_documents_do_not_become_neighbours(tmp_path: Path) -> None:
    texts = random_texts(200) + ["the same document"] * 200
    options = dataclasses.replace(SMALL, validation_fraction=0)
    manifest = prepare_jsonl(tmp_path, texts, options=options)
    same = [text == b"the same document" for text in document_texts(manifest, "train")]
    pairs = sum(a and b for a, b in itertools.pairwise(same))
    assert 60 < pairs < 140  # 100 by chance, standard deviation about 7


@pytest.mark.parametrize("piece_bytes", [4_000, 1 << 20])
def test_deduplicate_keeps_one_of_equal_documents(tmp_path: Path, piece_bytes: int) -> None:
    texts = random_texts(120)
    options = dataclasses.replace(SMALL, deduplicate=True)
    repeated = prepare_jsonl(
        tmp_path / "repeated", texts + texts[::2] + texts[::3], options=options, piece_bytes=piece_bytes
    )
    assert repeated.origin["dropped"] == {"duplicate": 100}
    stored = [text.decode() for split in repeated.splits for text in document_texts(repeated, split)]
    assert sorted(stored) == sorted(texts)
    # Which of them stays cannot be told: the order follows the content alone.
    options = dataclasses.replace(options, validation_fraction=0)
    one = prepare_jsonl(tmp_path / "one", texts, options=options)
    two = prepare_jsonl(tmp_path / "two", texts[::-1] + texts[:5], options=options)
    assert train_numbers(one) == train_numbers(two)


def test_a_large_set_is_split_by_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(2_000)
    first = prepare_jsonl(tmp_path / "first", texts, options=SMALL)
    monkeypatch.setattr(survey_module, "_EXACT_BYTES", 1_000)
    options = dataclasses.replace(SMALL, tokenizer=str(first.tokenizer_path))
    phases = set()
    manifest = prepare_text(
        tmp_path / "first" / "a.jsonl",
        tmp_path / "drawn",
        options=options,
        workers=1,
        progress=lambda status: phases.add(status.phase),
    ).manifest
    assert phases == {"tokenising", "writing shards"}  # nothing is read twice
    held = manifest.split("validation")["documents"]
    assert abs(held - 300) < 5 * np.sqrt(2_000 * 0.15 * 0.85)
    stored = [text.decode() for split in manifest.splits for text in document_texts(manifest, split)]
    assert sorted(stored) == sorted(texts)


def test_tokenizer_sample_is_bounded_and_of_training_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "TRAINING_BYTES", 5_000)
    words = ["".join(letters) for letters in itertools.islice(itertools.product("abcdefgh", repeat=4), 400)]
    texts = [f"{word} " * 36 for word in words]
    options = dataclasses.replace(SMALL, vocab_size=2_000, validation_fraction=0.3)
    manifest = prepare_jsonl(tmp_path, texts, options=options, piece_bytes=3_000)
    tokens = json.loads(manifest.tokenizer_path.read_text())["model"]["vocab"]
    seen = {word for word in words if f"\u0120{word}" in tokens}
    held = {text[:4].decode() for text in document_texts(manifest, "validation")}
    assert len(held) > 100
    assert len(seen) == 28  # the first whose 180 bytes pass 5,000
    assert not seen & held


@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=60).map(np.array), block_tokens=st.integers(1, 120))
def test_blocks_are_whole_documents_of_at_least_the_size(lengths: np.ndarray, block_tokens: int) -> None:
    ends = block_ends(lengths, block_tokens)
    blocks = [lengths[start:end] for start, end in itertools.pairwise([0, *ends])]
    assert np.concatenate(blocks).tolist() == lengths.tolist()
    for block in blocks[:-1]:
        assert block.sum() >= block_tokens
        assert block[:-1].sum() < block_tokens
    assert blocks[-1][:-1].sum() < block_tokens


@given(words=st.lists(st.integers(0, 2**63 - 1), unique=True, min_size=1), count=st.integers(1, 1 << 20))
def test_keys_of_places_never_meet_and_buckets_follow_them(words: list[int], count: int) -> None:
    found = keys.place_keys(np.array(words, dtype=np.int64), 0, "order", 0, "name")
    assert len(set(found.tolist())) == len(words)
    buckets = keys.buckets(found, count)
    expected = [key * count >> 64 for key in found.tolist()]
    assert buckets.tolist() == [((key >> 32) * count) >> 32 for key in found.tolist()]
    assert all(abs(int(bucket) - exact) <= 1 for bucket, exact in zip(buckets, expected, strict=True))
    order = np.argsort(found)
    assert (np.diff(buckets[order]) >= 0).all()
    assert keys.below(found, 2**64).all()
    assert not keys.below(found, 0).any()


def test_keys_are_uniform_and_depend_on_seed_and_purpose() -> None:
    offsets = np.arange(0, 200_000 * 100, 100)
    digests = keys.content_digests([str(number).encode() for number in range(200_000)])
    draws = [
        keys.place_keys(offsets, 0, "order", 0, "a"),
        keys.place_keys(offsets, 1, "order", 0, "a"),
        keys.place_keys(offsets, 0, "order", 0, "b"),
        keys.content_keys(digests, 0, "order"),
        keys.content_keys(digests, 0, "split"),
        keys.content_keys(digests, 1, "split"),
    ]
    for draw in draws:
        counts = np.bincount(keys.buckets(draw, 64), minlength=64)
        chi_square = ((counts - 3125.0) ** 2 / 3125).sum()
        assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)
    for one, other in itertools.combinations(draws, 2):
        correlation = np.corrcoef(one.astype(float), other.astype(float))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(one))
