"""Indexing shards of other writers: what is written, that the shards stay as they are, and that all faults of all
shards are told together."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import xxhash
from PIL import Image
from store_sets import archive, change, flipped, foreign_archive, image_members, jpeg, text_set

from data_pipeline.errors import DatasetExistsError
from data_pipeline.store import parallel
from data_pipeline.store.indexing import IndexFaultsError, IndexOptions, index_folder
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.samples import read_sample
from data_pipeline.store.verify import find_damage


def state_of(folder: Path, pattern: str = "*") -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def write(folder: Path, shards: dict[str, Iterable[tuple[str, bytes]]], foreign: bool = True) -> Path:
    for name, members in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(foreign_archive(members) if foreign else archive(members))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of webdataset's own writer."""
    out = tmp_path / "set"
    out.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(out / f"{shard:04d}.tar")) as writer:
            for number in range(5):
                sample = {"__key__": f"s{number}", "JPG": jpeg(20 + number, 10, number), "txt": f"{shard} {number}"}
                writer.write(sample)
    return out


def test_index_describes_what_webdataset_reads(folder: Path) -> None:
    before = state_of(folder, "*.tar")
    report = index_folder(folder, IndexOptions(kind="images"))
    assert state_of(folder, "*.tar") == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000.json",
        "0000.tar",
        "0001.json",
        "0001.tar",
        "manifest.json",
    ]
    manifest = Manifest.load(folder)
    assert manifest.fingerprint == report.manifest.fingerprint
    assert manifest.kind == "images"
    urls = [str(folder / shard["name"]) for shard in manifest.split("train")["shards"]]
    expected = list(webdataset.WebDataset(urls, shardshuffle=False))
    samples = manifest.samples("train")
    assert [sample.key for sample in samples] == [sample["__key__"] for sample in expected]
    for sample, theirs in zip(samples, expected, strict=True):
        members = read_sample(manifest, sample)
        assert {name: bytes(part) for name, part in members.items()} == {
            name: part for name, part in theirs.items() if not name.startswith("__")
        }
        picture = Image.open(io.BytesIO(theirs["jpg"]))
        assert sample.attributes == {"width": picture.width, "height": picture.height}
        assert all(entry["xxh3"] == xxhash.xxh3_64_hexdigest(members[e]) for e, entry in sample.members.items())
    split = manifest.split("train")
    assert split["samples"] == 10
    assert split["bytes"] == sum(len(part) for s in samples for part in read_sample(manifest, s).values())
    assert manifest.content["num_lanes"] >= 1
    assert find_damage(manifest) == []


def test_result_does_not_depend_on_processes_or_the_day(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = index_folder(folder, workers=1).manifest
    sidecars = state_of(folder, "0*.json")
    assert index_folder(folder).reused
    monkeypatch.setattr(parallel, "_WORTH_PROCESSES_BYTES", 0)
    assert index_folder(folder, workers=2, force=True).reused
    assert state_of(folder, "0*.json") == sidecars
    for path in folder.glob("*.json"):
        path.unlink()
    again = index_folder(folder, workers=2).manifest
    assert (again.content, again.fingerprint) == (first.content, first.fingerprint)


PICTURE = jpeg(8, 8)
SOUND = [(f"{n}.{e}", p) for n in range(4) for e, p in (("jpg", PICTURE), ("txt", b"x"))]


@pytest.mark.parametrize(
    ("members", "options", "messages"),
    [
        ([*SOUND, ("4.jpg", b"x")], {}, ["sample '4' has no .txt, as 4 of 5 samples do"]),
        ([*SOUND, ("3.cls", b"1")], {}, ["sample '3' has .cls, as only 1 of 4 samples do"]),
        ([*SOUND, ("0.txt", b"again")], {}, ["appears twice"]),
        ([*SOUND, ("0.cls", b"1")], {"optional": ("cls",)}, ["key '0' appears again after other samples"]),
        ([*SOUND, ("3.TXT", b"again")], {}, ["sample '3' has .txt twice"]),
        ([*SOUND, ("3.exe", b"x")], {"optional": ("exe",)}, ["unknown extension 'exe'", "--allow exe"]),
        ([*SOUND, ("3.pyd", b"x")], {"optional": ("pyd",), "allow": ("pyd",)}, ["pickled Python objects"]),
        ([*SOUND, ("README", b"x")], {}, ["'README' belongs to no sample"]),
        ([*SOUND, (".DS_Store", b"x")], {}, ["'.DS_Store' belongs to no sample"]),
        ([], {}, ["holds no sample"]),
        ([("__meta__", b"x")], {}, ["holds no sample"]),
        ([*SOUND, ("4.jpg", b"no picture"), ("4.txt", b"x")], {"kind": "images"}, ["4.jpg: not a JPEG"]),
        ([*SOUND, ("4.png", PICTURE[:40]), ("4.txt", b"x")], {"kind": "images"}, ["4.png: JPEG header cannot be"]),
        ([("0.txt", b"x")], {"kind": "images"}, ["the sample has 0 images"]),
        ([("0.txt", b"x")], {"kind": "latents"}, ["the sample has no lat.npy"]),
    ],
)
def test_faults_name_shard_byte_member_and_remedy(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], messages: list[str]
) -> None:
    folder = write(
        tmp_path / "set", {"a.tar": SOUND, "b.tar": members} if "optional" in options else {"b.tar": members}
    )
    before = state_of(folder)
    with pytest.raises(IndexFaultsError) as caught:
        index_folder(folder, IndexOptions(**options))
    assert state_of(folder) == before
    for message in messages:
        told = [fault for fault in caught.value.faults if message in fault]
        assert told, caught.value.faults
        assert all("b.tar: byte " in fault and "What to do: " in fault for fault in told)


def test_all_faults_of_all_shards_come_together(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set",
        {
            "a.tar": [*SOUND, ("4.pkl", b"x"), ("4.jpg", PICTURE), ("4.txt", b"x"), ("4.jpg", b"x"), ("5.jpg", b"x")],
            "b.tar": SOUND,
            "c.tar": SOUND,
            "d.tar": [],
        },
    )
    os.truncate(folder / "b.tar", 2_000)
    change(folder / "c.tar", located_header(folder / "c.tar", 3), 1, flipped)
    with pytest.raises(IndexFaultsError) as caught:
        index_folder(folder)
    found = "\n".join(caught.value.faults)
    for part in (
        "a.tar: byte ",
        "'4.pkl' holds pickled",
        "'4.jpg' appears twice",
        "sample '5' has no .txt",
        "b.tar: byte 2000: file ends inside member",
        "c.tar: byte ",
        "not a valid member header",
        "d.tar: byte 0: holds no sample",
    ):
        assert part in found, part


def located_header(path: Path, number: int) -> int:
    with tarfile.open(path) as reference:
        return reference.getmembers()[number].offset_data - 512 + 2


def test_optional_and_allowed_extensions(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"a.tar": [*SOUND, ("3.exe", b"x"), ("4.jpg", b"x")]})
    options = IndexOptions(optional=("exe", "txt"), allow=("exe",))
    assert index_folder(folder, options).manifest.split("train")["samples"] == 5


def test_numbered_parts_may_differ(tmp_path: Path) -> None:
    members = [("a.json", b"{}"), ("a.000.jpg", b"x"), ("a.002.flac", b"x"), ("b.json", b"{}"), ("b.001.jpg", b"x")]
    sample = index_folder(write(tmp_path / "set", {"a.tar": members})).manifest.samples("train")[0]
    assert list(sample.members) == ["json", "000.jpg", "002.flac"]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_latents_give_their_layout_and_must_be_alike(tmp_path: Path) -> None:
    def sample(number: int, shape: tuple[int, ...] = (4, 8, 8), width: int = 6) -> list[tuple[str, bytes]]:
        return [
            (f"{number}.lat.npy", npy(np.zeros(shape, np.float16))),
            (f"{number}.cond.npy", npy(np.zeros((3 + number, width), np.float32))),
            (f"{number}.json", json.dumps({"label": number}).encode()),
        ]

    folder = write(tmp_path / "set", {"a.tar": [*sample(0), *sample(1)], "b.tar": sample(2)})
    manifest = index_folder(folder, IndexOptions(kind="latents")).manifest
    assert manifest.content["latents"] == {
        "shape": [4, 8, 8],
        "conditioning": {"dims": 2, "width": 6},
        "label": True,
        "caption": False,
        "longest_conditioning": 5,
    }
    assert manifest.samples("train")[2].attributes == {"shape": [4, 8, 8], "conditioning": [5, 6], "label": 2}
    assert find_damage(manifest) == []
    write(folder, {"c.tar": sample(3, shape=(4, 8, 9)), "d.tar": sample(4, width=7)})
    with pytest.raises(IndexFaultsError) as caught:
        index_folder(folder, IndexOptions(kind="latents"), force=True)
    assert [fault.split(": ")[0][-5:] for fault in caught.value.faults] == ["c.tar", "d.tar"]
    (folder / "c.tar").unlink()
    (folder / "d.tar").unlink()
    write(folder, {"c.tar": sample(9)})
    with pytest.raises(IndexFaultsError, match="conditioning of 12 tokens, the dataset's longest has 5"):
        index_folder(folder, append=True)
    write(folder, {"c.tar": sample(1)})
    appended = index_folder(folder, append=True).manifest
    assert appended.edition(manifest.fingerprint).content == manifest.content


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy(np.zeros((4, 8), np.float16)), "shape"),
        (npy(np.zeros((4, 8, 8), ">f4")), "dtype"),
        (npy(np.full((1, 2, 2), np.nan, np.float32)), "not finite"),
        (npy(np.zeros((1, 2, 2), np.float32))[:-1], "header says"),
        (b"PK\x03\x04", "npy"),
    ],
)
def test_bad_arrays_are_index_errors(tmp_path: Path, payload: bytes, message: str) -> None:
    folder = write(tmp_path / "set", {"a.tar": [("0.lat.npy", payload)]})
    with pytest.raises(IndexFaultsError, match=rf"a.tar: byte \d+: member 0.lat.npy: .*{message}"):
        index_folder(folder, IndexOptions(kind="latents"))


def test_object_array_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (pytest.fail, ("code from a data file ran",))

    stream = io.BytesIO()
    np.save(stream, np.array([[[Bomb()]]], dtype=object), allow_pickle=True)
    folder = write(tmp_path / "set", {"a.tar": [("0.lat.npy", stream.getvalue())]})
    with pytest.raises(IndexFaultsError, match=r"object array"):
        index_folder(folder, IndexOptions(kind="latents"))
    index_folder(folder)  # as bytes it may be listed
    assert any("object array" in fault for fault in find_damage(folder))


def test_validation_shards_are_held_out(tmp_path: Path) -> None:
    shards = {"train/0.tar": image_members(0, 2), "train/1.tar": image_members(2, 2), "val/0.tar": image_members(4, 2)}
    folder = write(tmp_path / "set", shards)
    manifest = index_folder(folder, IndexOptions(pattern="**/*.tar", validation="val/*")).manifest
    assert [shard["name"] for shard in manifest.split("train")["shards"]] == ["train/0.tar", "train/1.tar"]
    assert [shard["name"] for shard in manifest.split("validation")["shards"]] == ["val/0.tar"]
    assert find_damage(manifest) == []
    for glob in ("nothing*", "*"):
        with pytest.raises(IndexFaultsError, match="--validation"):
            index_folder(folder, IndexOptions(pattern="**/*.tar", validation=glob), force=True)


def test_appended_shards_make_an_edition(folder: Path) -> None:
    first = index_folder(folder, IndexOptions(kind="images")).manifest
    write(folder, {"0002.tar": image_members(0, 3)})
    with pytest.raises(DatasetExistsError, match=r"0002.tar \(number 2\) is added.*--append"):
        index_folder(folder, IndexOptions(kind="images"))
    second = index_folder(folder, append=True).manifest
    assert second.split("train")["samples"] == 13
    assert second.edition(first.fingerprint).content == first.content
    assert index_folder(folder, append=True).reused
    assert find_damage(second) == []


def test_another_index_is_not_replaced_unasked(folder: Path) -> None:
    index_folder(folder)
    (folder / "0001.tar").unlink()
    before = state_of(folder)
    with pytest.raises(DatasetExistsError, match=r"0001.tar \(number 1\) is missing.*--force"):
        index_folder(folder)
    assert state_of(folder) == before
    assert len(index_folder(folder, force=True).manifest.shard_table()) == 1


def test_what_is_in_the_way_stays(folder: Path) -> None:
    (folder / "0001.json").write_text('{"years": "of work"}')
    (folder / "manifest.tar").write_bytes((folder / "0000.tar").read_bytes())
    before = state_of(folder)
    with pytest.raises(IndexFaultsError) as caught:
        index_folder(folder)
    assert [("0001.json" in fault, "manifest.json" in fault) for fault in caught.value.faults] == [
        (True, False),
        (False, True),
    ]
    assert state_of(folder) == before


def test_prepared_sets_are_left_alone(tmp_path: Path) -> None:
    folder = text_set(tmp_path / "set").folder
    before = state_of(folder)
    with pytest.raises(DatasetExistsError, match="prepared dataset of kind text"):
        index_folder(folder, force=True)
    assert state_of(folder) == before


@pytest.mark.parametrize(
    ("options", "message"), [({"pattern": "*.zip"}, "no file that matches"), ({"kind": "text"}, "must be one of")]
)
def test_user_errors(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_folder(folder, IndexOptions(**options))
    with pytest.raises(ValueError, match="not a folder"):
        index_folder(folder / "0000.tar")
    with pytest.raises(ValueError, match="no index to append to"):
        index_folder(folder, append=True)


def test_long_names_are_read_back(tmp_path: Path) -> None:
    long = "d" * 120
    folder = write(tmp_path / "set", {"a.tar": [(f"{long}.txt", b"words"), ("größe.txt", b"more")]})
    manifest = index_folder(folder).manifest
    found = [(sample.key, bytes(read_sample(manifest, sample)["txt"])) for sample in manifest.samples("train")]
    assert found == [(long, b"words"), ("größe", b"more")]


def test_shard_that_grows_meanwhile_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.store import foreign

    real = foreign.frame_hash
    times = iter(range(9))

    def meddle(*arguments: Any) -> str:
        os.utime(folder / "0001.tar", ns=(1, next(times)))
        return real(*arguments)

    monkeypatch.setattr(foreign, "frame_hash", meddle)
    with pytest.raises(IndexFaultsError, match=r"0001.tar: byte 0: changed while it was being indexed"):
        index_folder(folder, workers=1)
    assert not list(folder.glob(".*"))
