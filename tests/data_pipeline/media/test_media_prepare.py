"""Preparing media: every form of input, everything that is refused, and the same bytes however the work is done."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from media_samples import (
    bfloat16_bits,
    caption,
    contents,
    encoded,
    image_files,
    jpeg,
    latent,
    npy,
    picture,
    recording,
    wave,
    write_files,
    write_tar,
)

from data_pipeline.errors import DamagedDataError, DatasetExistsError
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.prepare import MediaReport, prepare_media
from data_pipeline.prepare.media.spill import cut_shards
from data_pipeline.prepare.workspace import Task
from data_pipeline.store.manifest import Manifest

ROOT = Path(__file__).parents[3]


def prepare(source: Path | list[Path], out: Path, kind: str, **options: Any) -> Manifest:
    sources = source if isinstance(source, list) else [source]
    given = {"validation_fraction": 0.2, "shard_bytes": 20_000, "vocab_size": 300, **options}
    report = prepare_media(sources, out, MediaOptions(kind=kind, **given), workers=1)
    assert report.manifest is not None
    return report.manifest


def stored(manifest: Manifest, extension: str) -> Counter[bytes]:
    """Payloads of all members with an extension, read without our reader."""
    found: Counter[bytes] = Counter()
    for split in manifest.splits:
        for sample in manifest.samples(split):
            raw = (manifest.folder / sample.shard).read_bytes()
            if extension in sample.members:
                member = sample.members[extension]
                found[raw[member["offset"] : member["offset"] + member["length"]]] += 1
    return found


def dropped(manifest: Manifest) -> dict[str, str]:
    return {item["path"]: item["why"] for item in manifest.origin["skipped"]}


def _as_parquet(path: Path, structs: bool) -> Path:
    path.parent.mkdir(parents=True)
    images: list[Any] = [jpeg(number) for number in range(12)]
    if structs:
        images = [{"bytes": image, "path": "x.jpg"} for image in images]
    texts = [caption(number) for number in range(12)]
    table = pyarrow.table({"image": images, "text" if structs else "caption": texts, "other": list(range(12))})
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    return path


def _with_caption_list(folder: Path, name: str, key: str) -> Path:
    write_files(folder, {f"pictures/{number}.jpg": jpeg(number) for number in range(12)})
    lines = [json.dumps({key: f"pictures/{n}.jpg", "text": caption(n)}) for n in range(12)]
    (folder / name).write_text("\n".join(lines))
    return folder


def _as_json(folder: Path) -> Path:
    for number in range(12):
        record = json.dumps({"caption": caption(number), "extra": 1}).encode()
        write_files(folder, {f"{number}.jpg": jpeg(number), f"{number}.json": record})
    return folder


def _as_tars(folder: Path) -> Path:
    files = [(f"{n:03d}", {"jpg": jpeg(n), "txt": caption(n).encode()}) for n in range(12)]
    for shard in range(3):
        members = {f"{key}.{e}": data for key, parts in files[4 * shard : 4 * shard + 4] for e, data in parts.items()}
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write_files(path / "source", image_files(12)),
        lambda path: _as_json(path / "source"),
        lambda path: _with_caption_list(path / "source", "metadata.jsonl", "file_name"),
        lambda path: _with_caption_list(path / "source", "captions.jsonl", "image") / "captions.jsonl",
        lambda path: _as_tars(path / "source"),
        lambda path: _as_parquet(path / "source" / "a.parquet", structs=False),
        lambda path: _as_parquet(path / "source" / "a.parquet", structs=True).parent,
    ],
    ids=["folder", "json", "metadata", "captions_file", "webdataset", "parquet", "parquet_folder"],
)
def test_images_from_every_form(make, tmp_path: Path) -> None:
    manifest = prepare(make(tmp_path), tmp_path / "out", "images")
    assert manifest.kind == "images"
    assert stored(manifest, "jpg") == Counter(jpeg(number) for number in range(12))
    assert stored(manifest, "txt") == Counter(caption(number).encode() for number in range(12))
    assert not manifest.origin["dropped"]
    pairs = {}
    for split in manifest.splits:
        for sample in manifest.samples(split):
            raw = (manifest.folder / sample.shard).read_bytes()
            parts = {e: raw[m["offset"] : m["offset"] + m["length"]] for e, m in sample.members.items()}
            pairs[parts["jpg"]] = parts["txt"].decode()
            assert set(sample.attributes) == {"width", "height", "source"}
    assert pairs == {jpeg(number): caption(number) for number in range(12)}
    if "json" in next(iter(manifest.samples("train"))).members:
        assert len(stored(manifest, "json")) == 12


def _latent_files(count: int) -> dict[str, dict[str, bytes]]:
    return {
        f"{number:03d}": {
            "npy": npy(latent(number).astype(np.float16)),
            "cond.npy": npy(np.full(5, number, np.float32)),
            "json": json.dumps({"label": number}).encode(),
        }
        for number in range(count)
    }


def _latent_parquet(path: Path) -> Path:
    rows = _latent_files(9).values()
    table = {
        "latent": [row["npy"] for row in rows],
        "cond": [row["cond.npy"] for row in rows],
        "label": list(range(9)),
    }
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def _flat(samples: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return {f"{key}.{extension}": data for key, parts in samples.items() for extension, data in parts.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write_files(path / "source", _flat(_latent_files(9))),
        lambda path: write_tar(path / "source" / "a.tar", _flat(_latent_files(9))),
        lambda path: _latent_parquet(path / "source" / "a.parquet"),
    ],
    ids=["folder", "webdataset", "parquet"],
)
def test_latents_from_every_form(make, tmp_path: Path) -> None:
    manifest = prepare(make(tmp_path), tmp_path / "out", "latents")
    assert stored(manifest, "lat.npy") == Counter(parts["npy"] for parts in _latent_files(9).values())
    assert stored(manifest, "cond.npy") == Counter(parts["cond.npy"] for parts in _latent_files(9).values())
    described = manifest.content["latents"]
    assert described["shape"] == [4, 6, 8]
    assert described["conditioning"] == {"dims": 1, "width": 5}
    assert (described["label"], described["caption"]) == (True, False)


def test_interleaved_from_jsonl_and_from_webdataset_are_the_same_documents(
    document_source: Path, document_set: Path, tmp_path: Path
) -> None:
    members: dict[str, bytes] = {}
    for number, line in enumerate(document_source.read_text().splitlines()):
        segments = json.loads(line)["segments"]
        for place, segment in enumerate(segments):
            if segment["type"] != "text":
                path = document_source.parent / segment.pop("path")
                members[f"{number:04d}.{place:03d}{path.suffix}"] = path.read_bytes()
        members[f"{number:04d}.json"] = json.dumps({"segments": segments}).encode()
    source = write_tar(tmp_path / "source.tar", members)
    first = Manifest.load(document_set)
    tokenizer = str(document_set / "tokenizer.json")
    second = prepare(source, tmp_path / "out", "interleaved", tokenizer=tokenizer)
    assert first.content["interleaved"] == second.content["interleaved"]
    for extension in ("json", "tok.npy", "001.jpg", "001.flac", "002.jpg"):
        assert stored(first, extension) == stored(second, extension)
        assert stored(first, extension)


def test_documents_hold_their_segments_in_order(document_source: Path, document_set: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(document_set / "tokenizer.json"))
    manifest = Manifest.load(document_set)
    originals = {f"documents.jsonl:{n}": json.loads(line)["segments"] for n, line in _lines(document_source)}
    seen = 0
    for split in manifest.splits:
        for sample in manifest.samples(split):
            raw = (manifest.folder / sample.shard).read_bytes()
            parts = {e: raw[m["offset"] : m["offset"] + m["length"]] for e, m in sample.members.items()}
            spans, tokens = sample.attributes["spans"], np.load(io.BytesIO(parts["tok.npy"]))
            found: list[Any] = []
            at = 0
            for place, span in enumerate(spans):
                if span[0] == "text":
                    found.append(tokenizer.decode(tokens[at : at + span[1]].tolist()))
                    at += span[1]
                else:
                    found.append(next(data for e, data in parts.items() if e.startswith(f"{place:03d}.")))
            assert at == len(tokens)
            assert [tokens[0], tokens[-1]] == [0, 1]
            expected: list[Any] = []
            for segment in originals[sample.attributes["source"]]:
                if segment["type"] == "text":
                    expected.append(segment["text"])
                else:
                    expected.append((document_source.parent / segment["path"]).read_bytes())
            assert [part for part in found if part != ""] == expected
            seen += 1
    assert seen == len(originals) == 50


def _lines(path: Path) -> list[tuple[int, str]]:
    return list(enumerate(path.read_text().splitlines(), start=1))


def test_captions_are_tokenised_with_the_given_tokenizer(image_set: Path, tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer

    manifest = Manifest.load(image_set)
    assert (image_set / "tokenizer.json").read_text() == tokenizer_file.read_text()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts, tokens = stored(manifest, "txt"), stored(manifest, "tok.npy")
    decoded = Counter(tokenizer.decode(np.load(io.BytesIO(raw))[1:-1].tolist()).encode() for raw in tokens.elements())
    assert decoded == texts


def test_webdataset_reads_the_shards(image_set: Path, document_set: Path) -> None:
    import webdataset

    for folder in (image_set, document_set):
        manifest = Manifest.load(folder)
        shards = [str(folder / shard["name"]) for shard in manifest.split("train")["shards"]]
        assert len(shards) > 1
        read = list(webdataset.WebDataset(shards, shardshuffle=False))
        samples = manifest.samples("train")
        assert [sample["__key__"] for sample in read] == [sample.key for sample in samples]
        for theirs, ours in zip(read, samples, strict=True):
            raw = (folder / ours.shard).read_bytes()
            expected = {e: raw[m["offset"] : m["offset"] + m["length"]] for e, m in ours.members.items()}
            assert {e: data for e, data in theirs.items() if not e.startswith("__")} == expected


def test_validation_is_a_share_by_content_and_shuffles_are_global(image_source: Path, tmp_path: Path) -> None:
    copies = write_files(tmp_path / "copies", {f"{n}{c}.jpg": jpeg(n) for n in range(30) for c in "ab"})
    manifest = prepare(copies, tmp_path / "out", "images", captions="none")
    sides = [set(stored_of(manifest, split)) for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert 0 < len(sides[1]) < 15
    order = [sample.attributes["source"] for sample in manifest.samples("train")]
    assert order != sorted(order)
    other = prepare(copies, tmp_path / "other", "images", captions="none", seed=1)
    assert [sample.attributes["source"] for sample in other.samples("train")] != order
    assert stored(other, "jpg") == stored(manifest, "jpg")


def stored_of(manifest: Manifest, split: str) -> list[str]:
    return [sample.members["jpg"]["xxh3"] for sample in manifest.samples(split)]


def test_bad_images_are_dropped_with_reasons(tmp_path: Path) -> None:
    good = {
        "ok.jpg": jpeg(1),
        "ok.txt": b"fine",
        "dots.in.name.png": encoded(picture(2), "PNG"),
        "dots.in.name.txt": b"x",
    }
    bad = {
        "cut.jpg": jpeg(3)[:-40],
        "cut.txt": b"x",
        "huge.jpg": encoded(picture(4, 200, 300)),
        "huge.txt": b"x",
        "heavy.png": encoded(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8), "PNG"),
        "heavy.txt": b"x",
        "tiny.jpg": encoded(picture(5, 8, 30)),
        "tiny.txt": b"x",
        "gif.jpg": encoded(picture(6), "GIF"),
        "gif.txt": b"x",
        "silent.jpg": jpeg(7),
        "blank.jpg": jpeg(8),
        "blank.txt": b"  \n",
        "latin.jpg": jpeg(9),
        "latin.txt": "é".encode("latin-1"),
        "alone.txt": b"no image",
        "two.jpg": jpeg(10),
        "two.png": encoded(picture(10), "PNG"),
        "two.txt": b"x",
        "notes.md": b"not a sample",
    }
    source = write_files(tmp_path / "source", good | bad)
    (source / "link.jpg").symlink_to(source / "ok.jpg")
    (source / "away").symlink_to(tmp_path)
    manifest = prepare(source, tmp_path / "out", "images", max_pixels=50_000, max_bytes=20_000, min_side=10)
    assert stored(manifest, "txt") == Counter([b"fine", b"x"])
    found = {path: why.partition(":")[0] for path, why in dropped(manifest).items()}
    assert found == {
        "cut": "undecodable image",
        "huge": "too large",
        "heavy": "too large",
        "tiny": "too small",
        "gif": "undecodable image",
        "silent": "missing caption",
        "blank": "missing caption",
        "latin": "caption is not UTF-8",
        "alone": "no image",
        "two": "several images",
        "notes.md": "unknown kind of file",
        "link.jpg": "link",
        "away": "link",
    }
    assert sum(manifest.origin["dropped"].values()) == len(found)


@pytest.mark.parametrize(("captions", "texts"), [("optional", [b"", b"said"]), ("none", [])])
def test_captions_may_be_left_out(captions: str, texts: list[bytes], tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", {"a.jpg": jpeg(1), "a.txt": b"said", "b.jpg": jpeg(2)})
    manifest = prepare(source, tmp_path / "out", "images", captions=captions)
    assert sorted(stored(manifest, "txt").elements()) == texts
    assert len(stored(manifest, "jpg")) == 2


def test_bad_latents_are_dropped_with_reasons(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "code_ran"),)

    infinite = latent(3)
    infinite[0, 0, 0] = np.nan
    parts = {f"ok{n}": {"lat.npy": npy(latent(n)), "json": b'{"label": 1}'} for n in range(3)}
    bad = {
        "pickle": npy(np.array([Evil()], dtype=object), allow_pickle=True),
        "shape": npy(latent(4, (4, 6, 9))),
        "flat": npy(latent(4)[0]),
        "double": npy(latent(4).astype("<f8")),
        "nan": npy(infinite),
        "inf_bits": npy(np.full((4, 6, 8), 0x7F80, np.uint16)),
        "text": b"no array",
    }
    parts |= {name: {"lat.npy": payload, "json": b'{"label": 2}'} for name, payload in bad.items()}
    parts["unlabelled"] = {"lat.npy": npy(latent(5)), "json": b"{}"}
    parts["odd_label"] = {"lat.npy": npy(latent(5)), "json": b'{"label": "cat"}'}
    parts["json_cut"] = {"lat.npy": npy(latent(5)), "json": b'{"label": '}
    source = write_files(tmp_path / "source", _flat(parts))
    manifest = prepare(source, tmp_path / "out", "latents", shape=(4, 6, 8))
    assert not (tmp_path / "code_ran").exists()
    assert sum(stored(manifest, "lat.npy").values()) == 3
    assert {path: why.partition(":")[0] for path, why in dropped(manifest).items()} == {
        "pickle": "pickled array",
        "shape": "wrong latent shape",
        "flat": "wrong latent shape",
        "double": "wrong latent dtype",
        "nan": "latent is not finite",
        "inf_bits": "latent is not finite",
        "text": "undecodable latent",
        "unlabelled": "no conditioning",
        "odd_label": "bad label",
        "json_cut": "not JSON",
    }


def test_bad_documents_are_dropped_with_reasons(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "source",
        {
            "ok.jpg": jpeg(1),
            "cut.jpg": jpeg(2)[:-30],
            "ok.flac": recording(wave(1)),
            "cut.wav": recording(wave(2), form="WAV")[:-9],
        },
    )
    write_files(tmp_path, {"outside.jpg": jpeg(3)})
    (source / "link.jpg").symlink_to(source / "ok.jpg")
    (source / "folder").symlink_to(tmp_path)
    text, image = {"type": "text", "text": "hello"}, {"type": "image", "path": "ok.jpg"}
    lines: list[tuple[str, str | None]] = [
        (json.dumps({"segments": [text, image, {"type": "speech", "path": "ok.flac"}]}), None),
        ("{", "not JSON"),
        ("[]", "no segments"),
        ('{"segments": []}', "no segments"),
        ('{"segments": ["text"]}', "bad segment"),
        ('{"segments": [{"type": "video", "path": "ok.jpg"}]}', "bad segment"),
        ('{"segments": [{"type": "text", "text": 5}]}', "bad segment"),
        ('{"segments": [{"type": "text", "text": ""}]}', "empty document"),
        ('{"segments": [{"type": "text", "text": "\\ud800"}]}', "not UTF-8"),
        ('{"segments": [{"type": "image", "path": "cut.jpg"}]}', "undecodable image"),
        ('{"segments": [{"type": "speech", "path": "cut.wav"}]}', "undecodable speech"),
        ('{"segments": [{"type": "speech", "path": "ok.jpg"}]}', "undecodable speech"),
        ('{"segments": [{"type": "image", "path": "absent.jpg"}]}', "unreadable"),
        ('{"segments": [{"type": "image", "path": "../outside.jpg"}]}', "unsafe path"),
        (json.dumps({"segments": [{"type": "image", "path": str(tmp_path / "outside.jpg")}]}), "unsafe path"),
        ('{"segments": [{"type": "image", "path": "link.jpg"}]}', "link"),
        ('{"segments": [{"type": "image", "path": "folder/outside.jpg"}]}', "link"),
        ('{"segments": [{"type": "image"}]}', "missing media"),
    ]  # fmt: skip
    (source / "documents.jsonl").write_text("\n\n".join(line for line, _ in lines))
    manifest = prepare(source / "documents.jsonl", tmp_path / "out", "interleaved", validation_fraction=0.0)
    assert [sample.attributes["source"] for sample in manifest.samples("train")] == ["documents.jsonl:1"]
    found = {path: why.partition(":")[0] for path, why in dropped(manifest).items()}
    expected = {f"documents.jsonl:{2 * n + 1}": reason for n, (_, reason) in enumerate(lines) if reason}
    assert {path: reason for path, reason in expected.items() if path in found} == found
    assert manifest.origin["dropped"] == dict(sorted(Counter(expected.values()).items()))


@pytest.mark.parametrize("kind", ["link", "escape", "cut", "flip"])
def test_a_damaged_or_unsafe_tar_is_an_error(kind: str, tmp_path: Path) -> None:
    import tarfile

    path = _as_tars(tmp_path / "source") / "1.tar"
    if kind in ("link", "escape"):
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("../a.jpg" if kind == "escape" else "a.jpg")
            if kind == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        raw = bytearray(path.read_bytes())
        raw[20] ^= 1
        path.write_bytes(raw)
    with pytest.raises(DamagedDataError, match=r"1\.tar: byte \d+: .*What to do"):
        prepare(tmp_path / "source", tmp_path / "out", "images")
    assert not (tmp_path / "out").exists()


def test_repeated_keys_in_a_tar_are_dropped(tmp_path: Path) -> None:
    members = {"a.jpg": jpeg(1), "a.txt": b"x", "b.jpg": jpeg(2), "b.txt": b"y", "a.json": b"{}"}
    manifest = prepare(write_tar(tmp_path / "x.tar", members), tmp_path / "out", "images")
    assert sum(stored(manifest, "jpg").values()) == 2
    assert manifest.origin["dropped"] == {"repeated key": 1}


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({}, "images", "holds no images"),
        ({"a.md": b"x"}, "latents", "holds no latents"),
        ({"a.jpg": b"x", "a.txt": b"x"}, "images", "none of the samples can be used; the first, a: undecodable"),
        ({"a.npy": b"x"}, "latents", "no latent can be used"),
        ({"a.parquet": b"x"}, "images", "not a whole Parquet file"),
    ],
)
def test_useless_sources(files: dict[str, bytes], kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_files(tmp_path / "source", files)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "source", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="No such file"):
        prepare(tmp_path / "absent", tmp_path / "out", kind)


def test_parquet_without_the_column_names_what_it_has(tmp_path: Path) -> None:
    path = _as_parquet(tmp_path / "source" / "a.parquet", structs=False)
    with pytest.raises(ValueError, match=r"no column 'picture'; it has image, caption, other.*--image-column"):
        prepare(path, tmp_path / "out", "images", image_column="picture")


def test_same_again_returns_other_is_refused_force_replaces(tmp_path: Path) -> None:
    source = write_files(tmp_path / "source", image_files(12))
    prepare(source, tmp_path / "out", "images")
    before = contents(tmp_path / "out")

    def again(force: bool = False, **options: Any) -> MediaReport:
        chosen = {"validation_fraction": 0.2, "shard_bytes": 20_000, "vocab_size": 300, **options}
        return prepare_media([source], tmp_path / "out", MediaOptions(kind="images", **chosen), workers=1, force=force)

    assert again().reused
    with pytest.raises(DatasetExistsError, match=r"seed was 0, now 5.*--force"):
        again(seed=5)
    assert contents(tmp_path / "out") == before
    assert not again(seed=5, force=True).reused
    write_files(source, {"new.jpg": jpeg(99), "new.txt": b"new"})
    with pytest.raises(DatasetExistsError, match="files have changed"):
        again(seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def small(kind: str) -> MediaOptions:
    return MediaOptions(kind=kind, validation_fraction=0.2, shard_bytes=12_000, vocab_size=300)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.prepare.media import inputs

    monkeypatch.setattr(inputs, "_PIECE_SAMPLES", 7)
    monkeypatch.setattr(inputs, "_PIECE_LINES", 9)


@pytest.mark.parametrize("kind", ["images", "interleaved"])
def test_bytes_do_not_depend_on_workers_tasks_or_pieces(
    kind: str, image_source: Path, document_source: Path, tmp_path: Path, small_pieces: None
) -> None:
    source = image_source if kind == "images" else document_source
    alone = prepare_media([source], tmp_path / "alone", small(kind), workers=1)
    assert alone.manifest is not None
    expected = contents(tmp_path / "alone")
    prepare_media([source], tmp_path / "pool", small(kind), workers=2)
    assert contents(tmp_path / "pool") == expected
    waiting = []
    for _ in range(2):  # once to convert, once to write what the others had left
        for index in range(3):
            report = prepare_media([source], tmp_path / "tasks", small(kind), workers=1, task=Task(index, 3))
            assert report.manifest is None
            waiting.append(report.waiting)
    assert "pieces of input are left to other tasks" in waiting[0]
    assert "shards are left to other tasks" in waiting[2]
    assert not waiting[-1]
    assert not (tmp_path / "tasks").exists()
    prepare_media([source], tmp_path / "tasks", small(kind), workers=1)
    assert contents(tmp_path / "tasks") == expected


@pytest.mark.usefixtures("small_pieces")
def test_the_size_of_pieces_changes_nothing(
    image_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.prepare.media import inputs

    prepare_media([image_source], tmp_path / "small", small("images"), workers=1)
    monkeypatch.setattr(inputs, "_PIECE_SAMPLES", 1000)
    prepare_media([image_source], tmp_path / "large", small("images"), workers=1)
    first, second = Manifest.load(tmp_path / "small"), Manifest.load(tmp_path / "large")
    assert first.fingerprint == second.fingerprint


_KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.prepare.media import inputs, stages
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.prepare import prepare_media
inputs._PIECE_SAMPLES = 7
name, after = sys.argv[3], int(sys.argv[4])
work = getattr(stages.MediaStages, name)
def dying(self, unit, meter):
    if unit >= after:
        os.kill(os.getpid(), signal.SIGKILL)
    work(self, unit, meter)
setattr(stages.MediaStages, name, dying)
options = MediaOptions(kind="images", validation_fraction=0.2, shard_bytes=12_000, vocab_size=300)
prepare_media([sys.argv[1]], sys.argv[2], options, workers=1)
"""


def test_killed_and_run_again_goes_on_and_gives_the_same_bytes(
    image_source: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.prepare.media import stages

    prepare_media([image_source], tmp_path / "whole", small("images"), workers=1)
    out = tmp_path / "out"
    for stage, after in (("_convert", 3), ("_write", 2)):
        command = [sys.executable, "-c", _KILLED, str(image_source), str(out), stage, str(after)]
        killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not out.exists()
    done: list[str] = []
    for name in ("_convert", "_write"):
        work = getattr(stages.MediaStages, name)
        monkeypatch.setattr(
            stages.MediaStages, name, lambda self, unit, meter, n=name, w=work: done.append(n) or w(self, unit, meter)
        )
    prepare_media([image_source], out, small("images"), workers=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert "_convert" not in done
    shards = sum(len(split["shards"]) for split in Manifest.load(out).content["splits"].values())
    assert done.count("_write") == shards - 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_full_disk_names_the_way_out(image_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from data_pipeline.prepare.media import shards

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.SampleShardWriter, "add", full)
    with pytest.raises(OSError, match=r"finished work is kept.*free space"):
        prepare_media([image_source], tmp_path / "out", small("images"), workers=1)
    assert not (tmp_path / "out").exists()


def test_shards_close_when_they_are_full() -> None:
    assert cut_shards(np.array([5, 5, 5, 20, 1]), 10) == [(0, 2), (2, 4), (4, 5)]
    assert cut_shards(np.array([], dtype=np.int64), 10) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from data_pipeline import cli

    source = write_files(tmp_path / "source", {**image_files(12), "broken.jpg": b"x", "broken.txt": b"x"})
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    command = [
        "prepare",
        "images",
        str(source),
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--validation-fraction",
        "0.2",
    ]
    assert cli.run(parser.parse_args(command)) == 0
    printed = capsys.readouterr().out
    assert "images; segments of" in printed
    assert "broken: undecodable image" in printed
    assert cli.run(parser.parse_args([*command, "--task", "0"])) == 2
    assert cli.run(parser.parse_args([*command, "--task", "0", "--tasks", "2", "--force"])) == 2
    shared = [*command[:3], str(tmp_path / "shared"), *command[4:], "--tasks", "2", "--task"]
    assert [cli.run(parser.parse_args([*shared, task])) for task in "101"] == [75, 75, 0]
    assert "run the same command without --task" in capsys.readouterr().out
    latents = write_files(tmp_path / "latents", {"a.npy": npy(bfloat16_bits(latent(1))), "a.txt": b"x"})
    command = ["prepare", "latents", str(latents), str(tmp_path / "out2"), "--workers", "1", "--shape", "4,6,8"]
    assert cli.run(parser.parse_args(command)) == 0
    assert cli.run(parser.parse_args([*command, "--shape", "4x6"])) == 2
