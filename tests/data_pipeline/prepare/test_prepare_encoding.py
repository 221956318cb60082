"""A faster tokeniser is used where it gives the same ids as the reference, and only there."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prepare_helpers import contents, random_texts, write_jsonl
from text_corpus import SMALL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import data_pipeline.prepare.encoding as encoding_module
from data_pipeline.prepare.encoding import HuggingFace, choose_backend, frame, make_backend
from data_pipeline.prepare.text import prepare_text
from data_pipeline.prepare.tokenizer import TokenizerFile, load_tokenizer_file
from data_pipeline.store.manifest import Manifest

SAMPLE = [text.encode() for text in random_texts(300)]


class Same(HuggingFace):
    """The reference under another name."""


class Different(HuggingFace):
    """Wrong in the last token of long documents."""

    def __call__(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = super().__call__(documents)
        for end, raw in zip(np.cumsum(lengths), documents, strict=True):
            if len(raw) > 200:
                ids[end - 1] += 1
        return ids, lengths


class Breaking(HuggingFace):
    """Cannot take the tokenizer."""

    def __init__(self, file: TokenizerFile) -> None:
        raise RuntimeError("unsupported pretokenizer")


@pytest.fixture
def file(dataset: Path) -> TokenizerFile:
    return load_tokenizer_file(dataset / "tokenizer.json")


def install(monkeypatch: pytest.MonkeyPatch, backend: type[HuggingFace]) -> None:
    monkeypatch.setattr(encoding_module, "find_spec", lambda name: object())
    monkeypatch.setattr(encoding_module, "FAST_BACKENDS", {"gigatoken": backend})


@pytest.mark.parametrize(
    ("backend", "expected", "why"),
    [
        (Same, "gigatoken", "same ids as tokenizers on 31"),
        (Different, "hf", "gigatoken differs from tokenizers on"),
        (Breaking, "hf", "gigatoken cannot take this tokenizer (RuntimeError: unsupported pretokenizer)"),
    ],
)
def test_fast_backend_is_chosen_for_equal_ids_only(
    file: TokenizerFile, monkeypatch: pytest.MonkeyPatch, backend: type[HuggingFace], expected: str, why: str
) -> None:
    install(monkeypatch, backend)
    for wanted in ("auto", "gigatoken"):
        name, reason = choose_backend(wanted, file, SAMPLE)
        assert name == expected
        assert reason.startswith(why)
    assert choose_backend("hf", file, SAMPLE) == ("hf", "asked for")


def test_absent_backend_is_passed_over(file: TokenizerFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "find_spec", lambda name: None)
    assert choose_backend("auto", file, SAMPLE) == ("hf", "gigatoken is not installed")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(ValueError, match=r"begun with the gigatoken tokeniser.*--tokenizer-backend hf"):
        make_backend("gigatoken", file)


def test_dataset_does_not_depend_on_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", random_texts(80))
    reference = prepare_text(tmp_path / "a.jsonl", tmp_path / "hf", options=SMALL, workers=1, backend="hf").manifest
    assert reference.origin["tokenizer_backend"] == "hf"
    for backend, used in ((Same, "gigatoken"), (Different, "hf")):
        install(monkeypatch, backend)
        out = tmp_path / backend.__name__
        manifest = prepare_text(tmp_path / "a.jsonl", out, options=SMALL, workers=1).manifest
        assert manifest.origin["tokenizer_backend"] == used
        assert manifest.fingerprint == reference.fingerprint
        found, expected = contents(out), contents(tmp_path / "hf")
        del found["manifest.json"], expected["manifest.json"]
        assert found == expected
        # The same set again, with another back end asked for, is still the same set.
        assert prepare_text(tmp_path / "a.jsonl", out, options=SMALL, workers=1, backend="hf").reused


def test_a_backend_that_passes_the_sample_is_caught_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Different)
    monkeypatch.setattr(encoding_module, "first_difference", lambda *arguments: None)  # an unlucky sample
    texts = [" ".join(random_texts(40)), *random_texts(40)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(ValueError, match=r"a.jsonl: at 0 the gigatoken tokeniser differs.*backend hf --force"):
        prepare_text(tmp_path / "a.jsonl", tmp_path / "out", options=SMALL, workers=1)
    assert not (tmp_path / "out").exists()


def test_frame_puts_ids_around_every_document(file: TokenizerFile) -> None:
    encoded = frame(np.array([7, 8, 9], np.uint32), np.array([2, 0, 1]), file, "<u2")
    bos, eos = file.bos_id, file.eos_id
    assert encoded.tokens.tolist() == [bos, 7, 8, eos, bos, eos, bos, 9, eos]
    assert encoded.lengths.tolist() == [4, 2, 3]
    assert encoded.tokens.dtype == "<u2"
    assert frame(np.empty(0, np.uint32), np.empty(0, np.int64), file, "<u2").tokens.tolist() == []


def test_document_of_no_tokens_is_dropped(dataset: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["a", " \n ", " b", "   "])
    options = dataclasses.replace(SMALL, tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0)
    manifest = prepare_text(tmp_path / "a.jsonl", tmp_path / "out", options=options, workers=1).manifest
    assert manifest.origin["dropped"] == {"no tokens": 2}
    assert manifest.split("train")["documents"] == 2
    assert manifest.split("train")["tokens"] == 3 + 3


def test_tokenizer_that_cannot_take_a_text_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "known": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["known", "strange"])
    options = dataclasses.replace(SMALL, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"cannot encode a document.*UNK"):
        prepare_text(tmp_path / "a.jsonl", tmp_path / "out", options=options, workers=1)


def test_gigatoken_itself(dataset: Path, file: TokenizerFile) -> None:
    special = b"before <|eos|> middle <|bos|> after"
    one, other = make_backend("gigatoken", file), HuggingFace(file)
    for documents in ([*SAMPLE, special], [special], [], [b"x"]):
        for found, expected in zip(one(documents), other(documents), strict=True):
            assert found.tolist() == expected.tolist()
    assert choose_backend("auto", file, SAMPLE)[0] == "gigatoken"
    assert isinstance(sys.modules["gigatoken"], types.ModuleType)
    assert Manifest.load(dataset).origin["tokenizer_backend"] == "gigatoken"
