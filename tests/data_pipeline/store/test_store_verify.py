"""Verify reports every fault of a whole dataset together, and no changed byte of a shard escapes it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_sets import (
    VOCABULARY,
    archive,
    change,
    flipped,
    foreign_archive,
    image_members,
    image_set,
    jpeg,
    text_set,
    write_manifest,
)

from data_pipeline.errors import DamagedDataError, MissingDataError
from data_pipeline.store.arrays import npy_bytes
from data_pipeline.store.content import content_faults
from data_pipeline.store.indexing import IndexOptions, index_folder
from data_pipeline.store.manifest import SAMPLES_FORMAT, Manifest
from data_pipeline.store.sidecar import digest_of_bytes
from data_pipeline.store.verify import find_damage


def indexed_set(folder: Path) -> Manifest:
    """Shards of the standard library's writer, with PAX records and a long name, indexed."""
    folder.mkdir()
    long_name = "d" * 120 + ".jpg"
    members = [*image_members(0, 2), (long_name, image_members(7, 1)[0][1]), (long_name[:-3] + "txt", b"long")]
    (folder / "a.tar").write_bytes(foreign_archive(members))
    return index_folder(folder, IndexOptions(kind="images")).manifest


@pytest.fixture(scope="module", params=[text_set, image_set, indexed_set])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    manifest = request.param(tmp_path_factory.mktemp("sets") / request.param.__name__)
    assert find_damage(manifest) == []
    return manifest


@given(place=st.floats(0, 1, exclude_max=True), xor=st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_escapes(sound: Manifest, place: float, xor: int) -> None:
    path = sound.folder / sound.split("train")["shards"][0]["name"]
    at = int(place * path.stat().st_size)
    change(path, at, 1, lambda old: bytes([old[0] ^ xor]))
    try:
        faults = find_damage(sound)
    finally:
        change(path, at, 1, lambda old: bytes([old[0] ^ xor]))
    assert faults
    assert all(path.name in fault for fault in faults)


@pytest.mark.parametrize("field", [slice(0, 100), slice(100, 124), slice(124, 136), slice(148, 157), slice(257, 512)])
def test_no_changed_byte_of_a_header_escapes(sound: Manifest, field: slice) -> None:
    """Each byte of each field, the checksum's own filling included, which a checksum cannot guard."""
    path = sound.folder / sound.split("train")["shards"][0]["name"]
    for at in range(field.start, field.stop, 7):
        for value in (0, 32, 48):
            data = path.read_bytes()
            if data[at] == value:
                continue
            change(path, at, 1, lambda old, value=value: bytes([value]))
            faults = find_damage(sound)
            path.write_bytes(data)
            assert faults, f"byte {at} set to {value}"


def test_all_faults_come_together(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set", shards=4)
    folder = manifest.folder
    blocks = manifest.shard_blocks(manifest.split("train")["shards"][1])
    for block in blocks[:2]:
        change(folder / "train-000001.tar", block.members["tok.npy"]["offset"] + 100, 1, flipped)
    (folder / "train-000003.tar").unlink()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "validation-000000.json").unlink()
    found = "\n".join(find_damage(manifest))
    assert all(f"{block.key}.tok.npy" in found for block in blocks[:2])
    assert f"{blocks[2].key}.tok.npy" not in found
    for name in ("train-000003.tar", "tokenizer.json", "validation-000000.json"):
        assert name in found


def test_missing_files_are_told_apart_from_damaged_ones(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    (manifest.folder / "train-000001.json").unlink()
    with pytest.raises(MissingDataError, match=r"shard train-000001.tar: .*train-000001.json"):
        manifest.blocks("train")


def rewrite_block(folder: Path, tokens: np.ndarray, offsets: np.ndarray, claims: dict[str, int]) -> Manifest:
    """One block of anything, with headers, hashes and manifest that agree with it."""
    manifest = text_set(folder, shards=1, blocks=1)
    name = "train-000000.tar"
    members = [("000000000000.off.npy", npy_bytes(offsets)), ("000000000000.tok.npy", npy_bytes(tokens))]
    data = archive(members)
    (folder / name).write_bytes(data)
    path = folder / "train-000000.json"
    tree = json.loads(path.read_text())
    block = tree["blocks"][0]
    at = 512
    for extension, (_, payload) in zip(("off.npy", "tok.npy"), members, strict=True):
        block["members"][extension] = {
            "offset": at,
            "length": len(payload),
            "xxh3": xxhash.xxh3_64_hexdigest(payload),
        }
        at += 512 + len(payload) + -len(payload) % 512
    block |= {"tokens": len(tokens), "documents": len(offsets) - 1, "largest_id": int(tokens.max())} | claims
    tree |= {"size": len(data)}
    path.write_text(json.dumps(tree))
    content = manifest.content
    shard = content["splits"]["train"]["shards"][0]
    shard |= {"size": len(data), "sidecar_hash": digest_of_bytes(path.read_bytes())}
    for count in ("tokens", "documents", "largest_id"):
        shard[count] = block[count]
        if count in content["splits"]["train"]:
            content["splits"]["train"][count] = block[count]
    return write_manifest(folder, content, "pretrain-text-blocks")


TOKENS = np.array([0, 5, 1, 0, 6, 7, 1], dtype=np.uint16)
OFFSETS = np.array([0, 3, 7], dtype=np.int64)


@pytest.mark.parametrize(
    ("tokens", "offsets", "claims", "message"),
    [
        (TOKENS, OFFSETS, {}, None),
        (TOKENS, np.array([0, 7, 7]), {}, "do not rise"),
        (TOKENS, np.array([0, 5, 3]), {}, "do not rise"),
        (TOKENS, np.array([0, 3, 9]), {}, "do not rise"),
        (TOKENS, np.array([1, 3, 7]), {}, "do not rise"),
        (TOKENS.astype(np.uint32), OFFSETS, {}, "dtype <u4 instead of <u2"),
        (TOKENS, OFFSETS.astype(np.uint32), {}, "dtype <u4 instead of <i8"),
        (
            np.where(TOKENS == 7, VOCABULARY, TOKENS).astype(np.uint16),
            OFFSETS,
            {"largest_id": 6},
            "token id 50 is outside the vocabulary of 50",
        ),
        (TOKENS, OFFSETS, {"largest_id": 6}, "largest token id 7, the sidecar says 6"),
        (TOKENS, OFFSETS, {"tokens": 6}, "do not rise from 0 to 6"),
    ],
)
def test_contents_are_checked_behind_sound_hashes(
    tmp_path: Path, tokens: np.ndarray, offsets: np.ndarray, claims: dict[str, int], message: str | None
) -> None:
    faults = find_damage(rewrite_block(tmp_path / "set", tokens, offsets, claims))
    if message is None:
        assert faults == []
    else:
        assert any(message in fault for fault in faults), faults


def test_ids_outside_the_vocabulary_are_an_error_before_any_shard_is_read(tmp_path: Path) -> None:
    tokens = np.where(TOKENS == 7, VOCABULARY, TOKENS).astype(np.uint16)
    with pytest.raises(DamagedDataError, match=r"train-000000.tar holds token id 50, outside the vocabulary of 50"):
        rewrite_block(tmp_path / "set", tokens, OFFSETS, {})


def edited(folder: Path, change_content: Any, change_sample: Any = None) -> Manifest:
    """An image set whose manifest, or first sample, claims something else."""
    manifest = image_set(folder, shards=1)
    content = manifest.content
    if change_sample is not None:
        path = folder / "train-000000.json"
        tree = json.loads(path.read_text())
        change_sample(tree["samples"][0])
        path.write_text(json.dumps(tree))
        content["splits"]["train"]["shards"][0]["sidecar_hash"] = digest_of_bytes(path.read_bytes())
    change_content(content)
    return write_manifest(folder, content, SAMPLES_FORMAT)


@pytest.mark.parametrize(
    ("change_content", "change_sample", "message"),
    [
        (lambda c: c["splits"]["train"].update(samples=4), None, "split train has 4 samples, its shards 3"),
        (lambda c: c["splits"]["train"]["shards"][0].update(samples=4), None, "3 samples, the manifest says 4"),
        (lambda c: c["splits"]["train"]["shards"][0].update(bytes=1), None, "the manifest says 1"),
        (lambda c: None, lambda s: s["attributes"].update(width=99), "says width 99"),
        (lambda c: None, lambda s: s["members"].pop("txt"), "000000.txt' is not in the sidecar"),
        (lambda c: None, lambda s: s.update(key="x"), "found member '000000.jpg'"),
    ],
)
def test_claims_are_checked_against_the_members(
    tmp_path: Path, change_content: Any, change_sample: Any, message: str
) -> None:
    found = "\n".join(find_damage(edited(tmp_path / "set", change_content, change_sample)))
    assert message in found


def test_progress_reaches_the_whole(tmp_path: Path) -> None:
    manifest = text_set(tmp_path / "set")
    seen: list[tuple[str, int, int]] = []
    find_damage(manifest, progress=lambda *now: seen.append(now))
    total = sum(path.stat().st_size for path in manifest.folder.glob("*.tar"))
    assert seen[-1] == ("verifying", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.store import parallel

    manifest = text_set(tmp_path / "set")
    change(manifest.folder / "train-000001.tar", 3_000, 1, flipped)
    alone = find_damage(manifest, workers=1)
    monkeypatch.setattr(parallel, "_WORTH_PROCESSES_BYTES", 0)
    assert find_damage(manifest, workers=2) == alone != []


class Remote:
    """A storage that is no local folder."""

    def __init__(self, folder: Path) -> None:
        from data_pipeline.fetch.storage import LocalStorage

        self.url = "https://store.example/sets/one"
        self._local = LocalStorage(folder)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self._local.read(name, start, length)

    def size(self, name: str) -> int:
        return self._local.size(name)

    def close(self) -> None:
        self._local.close()


@pytest.mark.parametrize("make", [text_set, image_set])
def test_remote_sets_are_verified_alike(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path / "set").folder
    manifest = Manifest.load("https://store.example/sets/one", Remote(folder))
    assert not manifest.is_local
    assert find_damage(manifest) == []
    change(folder / "train-000001.tar", 1_000, 1, flipped)
    (folder / "train-000002.tar").unlink()
    faults = find_damage(manifest)
    assert any("https://store.example/sets/one/train-000001.tar: byte" in fault for fault in faults)
    assert any("train-000002.tar" in fault for fault in faults)
    shutil.rmtree(folder)
    with pytest.raises(MissingDataError, match=r"https://store\.example/sets/one is not a prepared dataset"):
        Manifest.load("https://store.example/sets/one", Remote(folder))


def wave(frames: int, rate: int = 8_000) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(frames), rate, format="WAV")
    return stream.getvalue()


DOCUMENT = {
    "tok.npy": npy_bytes(np.arange(5, dtype=np.uint16)),
    "001.jpg": jpeg(20, 10),
    "003.wav": wave(800),
}
SPANS = [["text", 3], ["image", 10, 20], ["text", 2], ["speech", 800, 8_000]]


@pytest.mark.parametrize(
    ("members", "spans", "expected"),
    [
        ({}, SPANS, []),
        ({"001.jpg": jpeg(21, 10)}, SPANS, [("001.jpg", "found ['image', 10, 21], the sidecar says")]),
        ({"003.wav": wave(799)}, SPANS, [("003.wav", "found ['speech', 799, 8000]")]),
        ({"003.wav": b"RIFF no sound"}, SPANS, [("003.wav", "not a FLAC or WAV recording")]),
        ({"tok.npy": npy_bytes(np.arange(4, dtype=np.uint16))}, SPANS, [("", "4 tokens of text, the sidecar says 5")]),
        ({"tok.npy": npy_bytes(np.array([0, 1, 2, 3, 50], np.uint16))}, SPANS, [("tok.npy", "outside the vocabulary")]),
        ({"000.jpg": jpeg(8, 8)}, SPANS, [("000.jpg", "no such image or recording")]),
        ({}, [*SPANS, ["image", 1, 1]], [("", "image number 4 is not there")]),
    ],
)
def test_documents_of_several_media_are_checked_span_by_span(
    members: dict[str, bytes], spans: list[Any], expected: list[tuple[str, str]]
) -> None:
    content = {"kind": "interleaved", "tokenizer": {"vocab_size": VOCABULARY}}
    found = list(content_faults(content, DOCUMENT | members, {"spans": spans}))
    assert len(found) == len(expected), found
    for (extension, problem), (where, message) in zip(found, expected, strict=True):
        assert message in problem
        assert where in extension
