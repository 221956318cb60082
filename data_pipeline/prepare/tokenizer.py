"""The tokenizer of a dataset: training a byte-level BPE, or taking a given ``tokenizer.json``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS = "<|bos|>"
EOS = "<|eos|>"
SMALLEST_VOCABULARY = 258
# Names under which published tokenizers keep (beginning, end) of a document.
_KNOWN_PAIRS = (
    (BOS, EOS),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|startoftext|>", "<|endoftext|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


@dataclass(frozen=True)
class TokenizerFile:
    """A ``tokenizer.json`` as text, with the ids that frame each document and the number of ids."""

    text: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @property
    def dtype(self) -> str:
        """NumPy dtype string that holds every id."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it, but for the hash."""
        return {"vocab_size": self.vocab_size, "bos_id": self.bos_id, "eos_id": self.eos_id}


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError when ``vocab_size`` has no room for the 256 bytes and both special tokens."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary size {vocab_size} is below {SMALLEST_VOCABULARY} (256 bytes and two special tokens)"
        )


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerFile:
    """Train a byte-level BPE (Sennrich et al., ACL 2016; bytes as in GPT-2) with ``vocab_size`` ids.

    ``<|bos|>`` is id 0 and ``<|eos|>`` id 1. Fewer ids result when the text has too few pairs to merge.
    Raises ValueError as :func:`check_vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _describe(tokenizer, tokenizer.to_str(pretty=True), BOS, EOS)


def load_tokenizer_file(path: str | os.PathLike[str]) -> TokenizerFile:
    """Take an existing ``tokenizer.json``.

    Raises ValueError when it cannot be parsed or names no token for the beginning and end of a document.
    """
    from tokenizers import Tokenizer

    try:
        text = Path(path).read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(f"tokenizer {os.fspath(path)} cannot be used: {error}") from None
    for bos, eos in _KNOWN_PAIRS:
        if tokenizer.token_to_id(bos) is not None and tokenizer.token_to_id(eos) is not None:
            return _describe(tokenizer, text, bos, eos)
    expected = ", ".join(f"{bos} {eos}" for bos, eos in _KNOWN_PAIRS)
    raise ValueError(
        f"tokenizer {os.fspath(path)} has no token for the beginning and end of a document; expected one of "
        f"the pairs {expected}. What to do: add {BOS} and {EOS} to it as special tokens."
    )


def _describe(tokenizer: Tokenizer, text: str, bos: str, eos: str) -> TokenizerFile:
    # Ids of a foreign tokenizer may have gaps, so the count of tokens is not enough.
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return TokenizerFile(text, max(vocab.values()) + 1, vocab[bos], vocab[eos])
