"""Byte-level BPE: training one, or taking a given ``tokenizer.json``; and encoding documents in worker
processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.prepare.corpus import Document, content_digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS = "<|bos|>"
EOS = "<|eos|>"
CHUNK_BYTES = 1 << 20
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


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerFile:
    """Train a byte-level BPE (Sennrich et al., ACL 2016; bytes as in GPT-2) with ``vocab_size`` ids.

    ``<|bos|>`` is id 0 and ``<|eos|>`` id 1. Fewer ids result when the text has too few pairs to merge.
    Raises ValueError when ``vocab_size`` has no room for the 256 bytes and both special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"vocabulary size {vocab_size} is below 258 (256 bytes and two special tokens)")
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


@dataclass(frozen=True)
class Encoded:
    """Tokens of some documents joined, each framed by its first and last token, and the ``lengths`` of
    each."""

    tokens: np.ndarray
    lengths: np.ndarray


class DocumentEncoder:
    """Encodes documents read from ``root`` as ``[bos] + tokens + [eos]``."""

    def __init__(self, root: Path, file: TokenizerFile, dtype: str) -> None:
        from tokenizers import Tokenizer

        self._root, self._file, self._dtype = root, file, dtype
        self._tokenizer = Tokenizer.from_str(file.text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token is text: it must not turn into the end of a document.
        self._tokenizer.encode_special_tokens = True

    def __call__(self, documents: list[Document]) -> Encoded:
        """Encode ``documents``; raises ValueError when one has changed since it was scanned."""
        texts = [read_document(self._root, document) for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        bos, eos = [self._file.bos_id], [self._file.eos_id]
        parts = [np.array(bos + encoding.ids + eos, dtype=self._dtype) for encoding in encodings]
        return Encoded(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))


def read_document(root: Path, document: Document) -> str:
    """The text of a scanned document; raises ValueError when it has changed or gone."""
    try:
        raw = (root / document.path).read_bytes()
    except OSError as error:
        raise ValueError(f"{root / document.path} changed while it was being prepared: {error}") from None
    if content_digest(raw) != document.digest:
        raise ValueError(f"{root / document.path} changed while it was being prepared. Run prepare again.")
    return raw.decode("utf-8", "strict")


def chunks(documents: list[Document]) -> Iterator[list[Document]]:
    """Consecutive documents in groups of about ``CHUNK_BYTES``: the unit of work of one worker call."""
    group: list[Document] = []
    total = 0
    for document in documents:
        group.append(document)
        total += document.size
        if total >= CHUNK_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def encode_in_order(
    encoder_arguments: tuple[Path, TokenizerFile, str], documents: list[Document], workers: int
) -> Iterator[Encoded]:
    """Encode ``documents`` chunk by chunk in order, in ``workers`` processes (in this one for 1, or one chunk).

    Raises ChildProcessError when one of them dies.
    """
    # One chunk is not worth the start of processes.
    if workers == 1 or sum(document.size for document in documents) < CHUNK_BYTES:
        encoder = DocumentEncoder(*encoder_arguments)
        yield from map(encoder, chunks(documents))
        return
    from collections import deque
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # Spawned, not forked: the tokenizers library holds threads in this process.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, encoder_arguments)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks(documents):
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a tokenising process was killed, most likely for want of memory. What to do: run prepare again "
            "with fewer --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: DocumentEncoder | None = None


def _start_worker(root: Path, file: TokenizerFile, dtype: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # A killed parent would otherwise leave its idle workers behind.
    threading.Thread(target=leave_with_parent, daemon=True).start()
    global _encoder
    _encoder = DocumentEncoder(root, file, dtype)


def _encode(documents: list[Document]) -> Encoded:
    assert _encoder is not None
    return _encoder(documents)
