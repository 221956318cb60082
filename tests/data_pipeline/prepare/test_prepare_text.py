"""Preparing: what is written, from what, and what is never left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from text_corpus import SMALL, write_corpus

import data_pipeline.prepare.corpus as corpus_module
from data_pipeline.baselines import document_texts
from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare import keys
from data_pipeline.prepare.corpus import stdlib_corpus, text_corpus
from data_pipeline.prepare.metering import Status
from data_pipeline.prepare.text import choose_block_tokens, choose_num_lanes, prepare_text
from data_pipeline.prepare.workspace import workspace
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_stored_once_framed_and_exactly(corpus: Path, dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    stored = [text for split in manifest.splits for text in document_texts(manifest, split)]
    assert sorted(stored) == sorted(path.read_bytes() for path in corpus.rglob("*.txt"))
    ids = manifest.content["tokenizer"]
    reader = BlockReader(manifest, manifest.blocks("train"))
    assert len(reader.blocks) > 4
    for index in range(len(reader.blocks)):
        block = reader.read(index)
        assert (block.tokens[block.offsets[:-1]] == ids["bos_id"]).all()
        assert (block.tokens[block.offsets[1:] - 1] == ids["eos_id"]).all()
    for split in manifest.splits:
        entry = manifest.split(split)
        texts = list(document_texts(manifest, split))
        assert entry["bytes"] == sum(map(len, texts))
        assert entry["documents"] == len(texts)


def test_seed_changes_order_but_not_the_documents(corpus: Path, dataset: Path, tmp_path: Path) -> None:
    prepare_text(corpus, tmp_path / "out", options=dataclasses.replace(SMALL, seed=4), workers=1)
    first, second = Manifest.load(dataset), Manifest.load(tmp_path / "out")
    assert first.fingerprint != second.fingerprint
    texts = [[t for s in m.splits for t in document_texts(m, s)] for m in (first, second)]
    assert texts[0] != texts[1]
    assert sorted(texts[0]) == sorted(texts[1])


def test_webdataset_reads_the_shards(dataset: Path) -> None:
    import webdataset

    manifest = Manifest.load(dataset)
    shards = [str(dataset / shard["name"]) for shard in manifest.split("train")["shards"]]
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    blocks = manifest.blocks("train")
    assert [sample["__key__"] for sample in samples] == [block.key for block in blocks]
    reader = BlockReader(manifest, blocks)
    for index, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["tok.npy"], reader.read(index).tokens)
        np.testing.assert_array_equal(sample["off.npy"], reader.read(index).offsets)


def test_bad_files_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_corpus(source, num_documents=6)
    (source / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (source / "empty.txt").touch()
    (source / "dangling.txt").symlink_to(source / "absent")
    (source / "loop.txt").mkdir()
    (source / ".hidden").write_text("not taken")
    report = prepare_text(source, tmp_path / "out", options=SMALL, workers=1)
    skipped = {item["path"]: item["why"] for item in report.manifest.origin["skipped"]}
    assert set(skipped) == {"latin.txt", "empty.txt", "dangling.txt"}
    assert skipped["latin.txt"].startswith("not UTF-8: byte 3")
    assert skipped["empty.txt"] == "empty"
    assert skipped["dangling.txt"].startswith("unreadable: No such file")
    assert sum(split["documents"] for split in report.manifest.content["splits"].values()) == 6


def test_unreadable_file_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    write_corpus(source, num_documents=6)

    def refuse(file: corpus_module.InputFile) -> None:
        if file.name == "part0/document003.txt":
            raise PermissionError(errno.EACCES, "Permission denied", file.location)

    # Root reads every file, so permissions cannot show it.
    monkeypatch.setattr("data_pipeline.prepare.streams.check_unchanged", refuse)
    report = prepare_text(source, tmp_path / "out", options=SMALL, workers=1)
    assert report.manifest.origin["skipped"] == [
        {"path": "part0/document003.txt", "why": "unreadable: Permission denied"}
    ]
    assert report.manifest.origin["dropped"] == {"unreadable": 1}


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    text = "before <|eos|> middle <|bos|> after"
    (source / "a.txt").write_text(text)
    report = prepare_text(source, tmp_path / "out", options=SMALL, workers=1)
    assert list(document_texts(report.manifest, "train")) == [text.encode()]
    block = BlockReader(report.manifest, report.manifest.blocks("train")).read(0)
    assert int((block.tokens <= 1).sum()) == 2  # the frame alone


def test_given_tokenizer_is_used_and_copied(dataset: Path, corpus: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, tokenizer=str(dataset / "tokenizer.json"))
    prepare_text(corpus, tmp_path / "out", options=options, workers=1)
    assert Manifest.load(tmp_path / "out").fingerprint == Manifest.load(dataset).fingerprint
    (tmp_path / "bare.json").write_text((dataset / "tokenizer.json").read_text().replace("<|eos|>", "<|x|>"))
    options = dataclasses.replace(SMALL, tokenizer=str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="no token for the beginning and end"):
        prepare_text(corpus, tmp_path / "other", options=options, workers=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda source: None, "does not exist"),
        (lambda source: source.write_bytes(b""), "none of the documents in 1 file of"),
        (lambda source: source.mkdir(), "no file that matches"),
        (
            lambda source: (source.mkdir(), (source / "a").touch()),
            "none of the documents in 1 file of.*the first, a, is empty",
        ),
    ],
)
def test_missing_or_useless_source(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prepare_text(tmp_path / "source", tmp_path / "out", options=SMALL, workers=1)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_same_again_returns_and_other_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not prepare_text(corpus, out, options=SMALL, workers=1).reused
    before = contents(out)
    assert prepare_text(corpus, out, options=SMALL, workers=1).reused
    other = dataclasses.replace(SMALL, vocab_size=280)
    with pytest.raises(DatasetExistsError, match=r"vocab_size was 300, now 280.*--force"):
        prepare_text(corpus, out, options=other, workers=1)
    assert contents(out) == before
    assert not prepare_text(corpus, out, options=other, workers=1, force=True).reused
    assert Manifest.load(out).vocab_size == 280
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_dataset_is_not_taken_for_complete(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_text(corpus, out, options=SMALL, workers=1)
    os.truncate(out / "train-000000.tar", 600)
    with pytest.raises(DatasetExistsError, match=r"train-000000.tar.*--force"):
        prepare_text(corpus, out, options=SMALL, workers=1)


def test_foreign_folder_is_never_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="left alone"):
        prepare_text(corpus, tmp_path / "out", options=SMALL, workers=1, force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_swap_killed_half_way_is_undone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_text(corpus, out, options=SMALL, workers=1)
    out.rename(tmp_path / ".out.replaced")  # the state between the two renames of a swap
    assert prepare_text(corpus, out, options=SMALL, workers=1).reused


def test_second_writer_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workspace(out), pytest.raises(ValueError, match="another process is preparing"):
        prepare_text(corpus, out, options=SMALL, workers=1)


def test_file_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_corpus(source, num_documents=6)

    def meddle(status: Status) -> None:
        if status.phase == "training the tokenizer":
            (source / "part0" / "document000.txt").write_text("something else")

    with pytest.raises(ValueError, match=r"document000.txt changed"):
        prepare_text(source, tmp_path / "out", options=SMALL, workers=1, progress=meddle)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_that_are_only_touched_are_the_same_input(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_corpus(source, num_documents=6)
    prepare_text(source, tmp_path / "out", options=SMALL, workers=1)
    os.utime(source / "part0" / "document000.txt", (1, 1))
    assert prepare_text(source, tmp_path / "out", options=SMALL, workers=1).reused
    (source / "part0" / "document000.txt").write_text("other")
    with pytest.raises(DatasetExistsError, match=r"the files have changed.*--force"):
        prepare_text(source, tmp_path / "out", options=SMALL, workers=1)


@pytest.mark.parametrize("seed", range(5))
def test_equal_documents_fall_on_one_side_and_the_share_is_kept(tmp_path: Path, seed: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(80):
        (source / f"{number}.txt").write_text(f"document {number // 4:02d}")
    options = dataclasses.replace(SMALL, validation_fraction=0.1, seed=seed)
    manifest = prepare_text(source, tmp_path / "out", options=options, workers=1).manifest
    train, validation = (list(document_texts(manifest, split)) for split in ("train", "validation"))
    assert len(validation) == 8
    assert len(train) == 72
    assert not set(train) & set(validation)


def test_split_keeps_something_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the only document")
    options = dataclasses.replace(SMALL, validation_fraction=0.5)
    manifest = prepare_text(tmp_path / "one.txt", tmp_path / "out", options=options, workers=1).manifest
    assert manifest.splits == ("train",)


def test_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, word in enumerate(["alphabetical", "bewildering", "convolution", "discrepancy"]):
        (source / f"{number}.txt").write_text(f"{word} " * 50)
    options = dataclasses.replace(SMALL, validation_fraction=0.2)
    manifest = prepare_text(source, tmp_path / "out", options=options, workers=1).manifest
    vocabulary = json.loads(manifest.tokenizer_path.read_text())["model"]["vocab"]
    held_out = next(document_texts(manifest, "validation")).decode().split()[0]
    trained = [text.decode().split()[0] for text in document_texts(manifest, "train")]
    assert all("Ġ" + word in vocabulary for word in trained)
    assert "Ġ" + held_out not in vocabulary


def test_output_inside_the_source_is_not_read(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_documents=3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert len(text_corpus([tmp_path], exclude=tmp_path / "out").files) == 3
    assert len(text_corpus([f"{tmp_path}/**/*"], exclude=tmp_path / "out").files) == 3


def test_stdlib_corpus_is_sources_without_tests() -> None:
    files = [file.name for file in stdlib_corpus().files]
    assert {"ast.py", "asyncio/tasks.py", "collections/__init__.py"} <= set(files)
    assert not [f for f in files if {"test", "tests", "site-packages", "__pycache__"} & set(f.split("/"))]


@pytest.mark.parametrize(
    ("tokens", "block"), [(1_000, 4_096), (3_400_000, 32_768), (10**10, 1 << 20), (64 << 14, 1 << 14)]
)
def test_block_size_follows_the_size_of_the_set(tokens: int, block: int) -> None:
    assert choose_block_tokens(tokens) == block


@pytest.mark.parametrize(("blocks", "lanes"), [(1, 1), (7, 1), (84, 16), (10**6, 1024)])
def test_lanes_follow_the_number_of_blocks(blocks: int, lanes: int) -> None:
    assert choose_num_lanes(blocks) == lanes


def test_a_link_to_itself_is_dropped_like_any_unreadable_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_corpus(source, num_documents=6)
    (source / "loop.txt").symlink_to("loop.txt")
    report = prepare_text(source, tmp_path / "out", options=SMALL, workers=1)
    (skipped,) = report.manifest.origin["skipped"]
    assert skipped["path"] == "loop.txt"
    assert skipped["why"].startswith("unreadable: Too many levels of symbolic links")


@pytest.mark.parametrize("fraction", [0.02, 0.1])
def test_a_document_beyond_twice_the_share_is_never_held_out(tmp_path: Path, fraction: float) -> None:
    """The large document has the smallest key, so that it would be the first to be held out."""
    texts = [f"document {number} " * 20 for number in range(100)]
    large = "enormous " * 9000
    raws = [text.encode() for text in [large, *texts]]

    def first(seed: int) -> int:
        return int(np.argmin(keys.content_keys(keys.content_digests(raws), seed, "split")))

    seed = next(seed for seed in range(10_000) if first(seed) == 0)
    source = tmp_path / "source"
    source.mkdir()
    for number, text in enumerate([large, *texts]):
        (source / f"{number:03d}.txt").write_text(text)
    options = dataclasses.replace(SMALL, validation_fraction=fraction, seed=seed)
    manifest = prepare_text(source, tmp_path / "out", options=options, workers=1).manifest
    held, total = manifest.split("validation")["bytes"], sum(map(len, raws))
    assert fraction * total <= held < fraction * total + max(map(len, raws[1:]))
    assert large.encode() in list(document_texts(manifest, "train"))
    assert "Ġenormous" in json.loads(manifest.tokenizer_path.read_text())["model"]["vocab"]


def test_nothing_is_held_out_where_every_document_is_beyond_twice_the_share(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.txt").write_text(f"document {number}")
    options = dataclasses.replace(SMALL, validation_fraction=0.05)
    manifest = prepare_text(source, tmp_path / "out", options=options, workers=1).manifest
    assert manifest.splits == ("train",)
    assert manifest.split("train")["documents"] == 5
