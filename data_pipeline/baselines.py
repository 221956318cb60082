"""Reference points for validation bits per byte, on the very text that a model is scored on."""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Iterator

import numpy as np

from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockArrays, BlockReader

# Documents are shuffled, so this many tokens from the front are a fair sample of a larger training set.
_BIGRAM_TRAINING_TOKENS = 1 << 26


def bigram_bits_per_byte(path: str | os.PathLike[str]) -> float:
    """Bits per UTF-8 byte of a token bigram model on the validation split: every target of it, end tokens
    included.

    Counted on the training split (at most 2^26 tokens), with absolute discounting interpolated with the
    unigram (Ney, Essen & Kneser 1994): ``P(b|a) = max(c(ab) - d, 0) / c(a) + d * N1+(a.) / c(a) * P(b)``, ``d
    = n1 / (n1 + 2 n2)``, where n1 and n2 are the numbers of bigrams seen once and twice and N1+(a.) that of
    distinct successors of a; the unigram ``P(b)`` is add-one smoothed over the vocabulary. After an unseen
    ``a`` the model is the unigram.

    Raises ValueError when the dataset holds out no documents.
    """
    manifest = _with_validation(path)
    vocab_size = manifest.vocab_size
    codes = np.concatenate(list(_pair_codes(manifest, "train", _BIGRAM_TRAINING_TOKENS)))
    unigram = np.bincount(codes % vocab_size, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(codes, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.0
    context_count = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)

    bits = 0.0
    for held_out in _pair_codes(manifest, "validation", None):
        context, target = held_out // vocab_size, held_out % vocab_size
        at = np.minimum(np.searchsorted(pairs, held_out), len(pairs) - 1)
        seen = np.where(pairs[at] == held_out, np.maximum(counts[at] - discount, 0.0), 0.0)
        total = context_count[context]
        known = total > 0
        total = np.where(known, total, 1.0)
        backoff = np.where(known, discount * successors[context] / total, 1.0)
        bits -= float(np.log2(seen / total + backoff * unigram[target]).sum())
    return bits / int(manifest.split("validation")["bytes"])


def xz_bits_per_byte(path: str | os.PathLike[str]) -> float:
    """Bits per UTF-8 byte of the validation documents, joined in stored order, under ``xz -9e``.

    Raises ValueError when the dataset holds out no documents, or when its tokenizer does not give the text
    back exactly.
    """
    manifest = _with_validation(path)
    text = b"".join(document_texts(manifest, "validation"))
    num_bytes = int(manifest.split("validation")["bytes"])
    if len(text) != num_bytes:
        raise ValueError(
            f"{manifest.folder}: the held-out tokens decode to {len(text)} bytes, the documents had "
            f"{num_bytes}; the tokenizer is not lossless, so there is no text to compress."
        )
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / num_bytes


def document_texts(manifest: Manifest, split: str) -> Iterator[bytes]:
    """The UTF-8 text of each document of ``split`` in stored order, decoded from its tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    for block in _blocks(manifest, split):
        documents = np.split(block.tokens, block.offsets[1:-1])
        framed = [document[1:-1].tolist() for document in documents]
        yield from (text.encode() for text in tokenizer.decode_batch(framed, skip_special_tokens=False))


def _with_validation(path: str | os.PathLike[str]) -> Manifest:
    manifest = Manifest.load(path)
    if "validation" not in manifest.splits:
        raise ValueError(
            f"{manifest.folder} holds out no documents. What to do: prepare it with a larger --validation-fraction."
        )
    return manifest


def _blocks(manifest: Manifest, split: str) -> Iterator[BlockArrays]:
    reader = BlockReader(manifest, manifest.blocks(split))
    return (reader.read(index) for index in range(len(reader.blocks)))


def _pair_codes(manifest: Manifest, split: str, limit: int | None) -> Iterator[np.ndarray]:
    """``previous * vocabulary + next`` (int64) for each target, block by block; ``limit`` counts tokens."""
    left = math.inf if limit is None else limit
    for block in _blocks(manifest, split):
        if left <= 0:
            return
        left -= len(block.tokens)
        tokens = block.tokens.astype(np.int64)
        codes = tokens[:-1] * manifest.vocab_size + tokens[1:]
        yield np.delete(codes, block.offsets[1:-1] - 1)  # no pair across a document boundary
