"""Documents to token ids. The ``tokenizers`` library is the reference; a faster back end may take its place
where it gives the very same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from data_pipeline.prepare.tokenizer import TokenizerFile

BACKENDS = ("auto", "hf", "gigatoken")
_TRICKY = (
    " ",
    "\n\n\t  \r\n",
    "don't   I'LL we've  can't",
    "e\u0301\u00e9 \u200b\ufeff\u00a0x",
    "東京 größer λ ы \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "0123456789 3.14159 1,000,000 ١٢٣",
    "a" * 1000,
    "\x00\x01\x7f\ufffd",
)


@dataclass(frozen=True)
class Encoded:
    """Tokens of some documents joined, each framed by its first and last token, and the ``lengths`` of each
    (int64, frame included)."""

    tokens: np.ndarray
    lengths: np.ndarray


class Backend(Protocol):
    """Encodes text without special tokens: text that spells one is text."""

    def __call__(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all documents joined, number of ids of each, int64) for documents in UTF-8."""
        ...


class HuggingFace:
    """The reference."""

    def __init__(self, file: TokenizerFile) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(file.text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token is text: it must not turn into the end of a document.
        self._tokenizer.encode_special_tokens = True

    def __call__(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        texts = [raw.decode() for raw in documents]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"the tokenizer cannot encode a document: {error}. What to do: give a tokenizer that takes any text."
            ) from None
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return (np.concatenate(parts) if parts else np.empty(0, np.uint32)), lengths


class Gigatoken:
    """The ``gigatoken`` package, about a hundred times as fast on one core."""

    def __init__(self, file: TokenizerFile) -> None:
        import gigatoken

        tree = json.loads(file.text)
        # It always matches special tokens in text, so it must not know them.
        tree["added_tokens"] = [token for token in tree.get("added_tokens", []) if not token.get("special")]
        self._tokenizer = gigatoken.Tokenizer.from_json(json.dumps(tree))

    def __call__(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        layout: Any = self._tokenizer.encode_batch(list(documents), parallel=False).layout
        offsets = np.asarray(layout.offsets)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


FAST_BACKENDS: dict[str, type[Any]] = {"gigatoken": Gigatoken}


def make_backend(name: str, file: TokenizerFile) -> Backend:
    """Raises ValueError when the package of a frozen choice is missing on this machine."""
    if name == "hf":
        return HuggingFace(file)
    try:
        backend: Backend = FAST_BACKENDS[name](file)
    except ImportError as error:
        raise ValueError(
            f"this preparation was begun with the {name} tokeniser, which cannot be used here ({error}). "
            f"What to do: install {name} on every machine that takes part, or start anew with "
            "--tokenizer-backend hf --force."
        ) from None
    return backend


def choose_backend(wanted: str, file: TokenizerFile, sample: Sequence[bytes]) -> tuple[str, str]:
    """(name of the back end to use, why) for ``wanted`` of ``BACKENDS``.

    A fast back end is chosen only when it is installed and gives the same ids as the reference on every
    document of ``sample`` and on some tricky texts, among them those that spell special tokens.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"tokenizer backend {wanted!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if wanted == "hf":
        return "hf", "asked for"
    names = list(FAST_BACKENDS) if wanted == "auto" else [wanted]
    whys = []
    for name in names:
        if find_spec(name) is None:
            whys.append(f"{name} is not installed")
            continue
        texts = [*sample, *(text.encode() for text in _TRICKY), *_special_texts(file)]
        try:
            difference = first_difference(FAST_BACKENDS[name](file), HuggingFace(file), texts)
        except Exception as error:  # a young package may fail in any way; the reference does not
            whys.append(f"{name} cannot take this tokenizer ({type(error).__name__}: {error})")
            continue
        if difference is None:
            return name, f"same ids as tokenizers on {len(texts)} texts"
        whys.append(f"{name} differs from tokenizers on {texts[difference][:60].decode(errors='replace')!r}")
    return "hf", "; ".join(whys)


def first_difference(one: Backend, other: Backend, documents: Sequence[bytes]) -> int | None:
    """Index of the first of ``documents`` to which the two give different ids; None when all are the same."""
    ours, theirs = _split(*one(documents)), _split(*other(documents))
    assert len(theirs) == len(documents)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if not np.array_equal(a, b):
            return index
    return None if len(ours) == len(theirs) else 0


def frame(ids: np.ndarray, lengths: np.ndarray, file: TokenizerFile, dtype: str) -> Encoded:
    """Put the first and the last token around each document."""
    framed = lengths + 2
    ends = np.cumsum(framed)
    tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=dtype)
    inner = np.ones(len(tokens), dtype=bool)
    inner[ends - framed] = inner[ends - 1] = False
    tokens[ends - framed], tokens[ends - 1] = file.bos_id, file.eos_id
    tokens[inner] = ids
    return Encoded(tokens, framed)


def _special_texts(file: TokenizerFile) -> list[bytes]:
    added = json.loads(file.text).get("added_tokens") or []
    return [f"before {token['content']} after{token['content']}".encode() for token in added[:64]]


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
