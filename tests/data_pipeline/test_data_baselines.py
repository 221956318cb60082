"""Baselines against computations by other means."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from text_corpus import SMALL, write_corpus

from data_pipeline.baselines import bigram_bits_per_byte, document_texts, xz_bits_per_byte
from data_pipeline.prepare.text import PrepareOptions, prepare_text
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader


def documents(manifest: Manifest, split: str) -> list[list[int]]:
    reader = BlockReader(manifest, manifest.blocks(split))
    blocks = [reader.read(index) for index in range(len(reader.blocks))]
    return [d.tolist() for b in blocks for d in np.split(b.tokens, b.offsets[1:-1])]


def test_bigram_agrees_with_a_plain_computation(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    train, validation = documents(manifest, "train"), documents(manifest, "validation")
    bigrams = Counter(pair for d in train for pair in pairwise(d))
    targets = Counter(token for d in train for token in d[1:])
    contexts: Counter = Counter()
    successors: Counter = Counter()
    for (first, _), count in bigrams.items():
        contexts[first] += count
        successors[first] += 1
    once, twice = (sum(c == n for c in bigrams.values()) for n in (1, 2))
    discount = once / (once + 2 * twice)
    size = manifest.vocab_size

    def probability(first: int, second: int) -> float:
        unigram = (targets[second] + 1) / (targets.total() + size)
        if not contexts[first]:
            return unigram
        seen = max(bigrams[first, second] - discount, 0)
        return (seen + discount * successors[first] * unigram) / contexts[first]

    assert math.isclose(sum(probability(0, second) for second in range(size)), 1)
    bits = -sum(math.log2(probability(a, b)) for d in validation for a, b in pairwise(d))
    num_bytes = sum(map(len, document_texts(manifest, "validation")))
    assert bigram_bits_per_byte(dataset) == pytest.approx(bits / num_bytes, rel=1e-12)


def test_xz_compresses_the_held_out_text(corpus: Path, dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    texts = list(document_texts(manifest, "validation"))
    originals = {path.read_bytes() for path in corpus.rglob("*.txt")}
    assert set(texts) <= originals
    joined = b"".join(texts)
    expected = 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)
    assert xz_bits_per_byte(dataset) == pytest.approx(expected)


def test_no_validation_split_is_an_error(tmp_path: Path) -> None:
    write_corpus(tmp_path / "source", num_documents=4)
    options = PrepareOptions(vocab_size=SMALL.vocab_size, validation_fraction=0)
    prepare_text(tmp_path / "source", tmp_path / "out", options=options, workers=1)
    for baseline in (bigram_bits_per_byte, xz_bits_per_byte):
        with pytest.raises(ValueError, match="--validation-fraction"):
            baseline(tmp_path / "out")
