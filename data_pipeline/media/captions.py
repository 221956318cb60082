"""Captions: token ids padded to one length, and the text itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.media.arrays import TOKEN_DTYPES, parse_array
from data_pipeline.media.decode import DecodeError
from data_pipeline.store.manifest import Sample

TOKENS_MEMBER = "tok.npy"
TEXT_MEMBER, JSON_MEMBER = "txt", "json"
CAPTION_KEYS = ("caption", "text")

ReadMember = Callable[[str], memoryview]


def parse_tokens(payload: memoryview, vocab_size: int) -> np.ndarray:
    """Token ids of a ``tok.npy`` member, below ``vocab_size``. Raises DecodeError."""
    tokens = parse_array(payload, TOKEN_DTYPES, (1,))
    if int(tokens.max()) >= vocab_size:
        raise DecodeError(f"token id {int(tokens.max())} is outside the vocabulary of {vocab_size}")
    return tokens


def caption_of(sample: Sample, read: ReadMember) -> str | None:
    """The caption of a sample: its ``.txt``, or ``caption`` or ``text`` of its ``.json``; None without either.

    Raises DecodeError for text that is not UTF-8 or a broken JSON file.
    """
    try:
        if TEXT_MEMBER in sample.members:
            return bytes(read(TEXT_MEMBER)).decode("utf-8")
        if JSON_MEMBER in sample.members:
            return caption_in(json.loads(bytes(read(JSON_MEMBER))))
    except ValueError as error:
        raise DecodeError(f"caption cannot be read: {error}") from None
    return None


def caption_in(record: object) -> str | None:
    """The caption in a parsed JSON object."""
    if isinstance(record, dict):
        for key in CAPTION_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
    return None


def pad_tokens(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [B, length], mask bool [B, length]); longer captions keep their beginning."""
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=bool)
    for number, row in enumerate(rows):
        kept = row[:length]
        tokens[number, : len(kept)] = kept
        mask[number, : len(kept)] = True
    return tokens, mask
