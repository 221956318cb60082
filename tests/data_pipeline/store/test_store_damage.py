"""Every kind of damage to a prepared dataset is noticed, with the shard's name; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import TextDataConfig
from data_pipeline.errors import DamagedDataError
from data_pipeline.store import tar
from data_pipeline.store.arrays import npy_bytes, parse_npy
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader
from data_pipeline.store.verify import find_damage

SHARD = "train-000001.tar"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def member(folder: Path, number: int, extension: str) -> tuple[int, int]:
    sidecar = json.loads((folder / SHARD).with_suffix(".json").read_text())
    entry = sidecar["blocks"][number]["members"][extension]
    return entry["offset"], entry["length"]


def patch(path: Path, at: int, change: Callable[[bytes], bytes], length: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        old = stream.read(length)
        new = change(old)
        assert len(new) == len(old) == length
        assert new != old
        stream.seek(at)
        stream.write(new)


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def truncate(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-700])


def truncate_between_members(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[: member(folder, 1, "off.npy")[0] - 512])


def bit_flip_in_tokens(folder: Path) -> None:
    offset, length = member(folder, 0, "tok.npy")
    patch(folder / SHARD, offset + length - 3, flip, 1)


def bit_flip_in_offsets(folder: Path) -> None:
    offset, length = member(folder, 0, "off.npy")
    patch(folder / SHARD, offset + length - 8, flip, 1)


def bit_flip_in_header(folder: Path) -> None:
    patch(folder / SHARD, member(folder, 1, "tok.npy")[0] - 512 + 130, flip, 1)


def zeroed_sector(folder: Path) -> None:
    patch(folder / SHARD, member(folder, 1, "off.npy")[0] - 512, zero, 512)


def sidecar_edited(folder: Path) -> None:
    path = (folder / SHARD).with_suffix(".json")
    path.write_bytes(path.read_bytes().replace(b'"documents"', b'"document5"', 1))


def sidecar_missing(folder: Path) -> None:
    (folder / SHARD).with_suffix(".json").unlink()


def shard_missing(folder: Path) -> None:
    (folder / SHARD).unlink()


DAMAGE = [
    truncate,
    truncate_between_members,
    bit_flip_in_tokens,
    bit_flip_in_offsets,
    bit_flip_in_header,
    zeroed_sector,
    sidecar_edited,
    sidecar_missing,
    shard_missing,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_the_shard(copy: Path, damage: Callable[[Path], None]) -> None:
    assert find_damage(copy) == []
    damage(copy)
    faults = find_damage(copy)
    assert faults
    assert all("train-000001" in fault for fault in faults)


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_stops_at_the_damage(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    with pytest.raises(DamagedDataError, match=r"train-000001.*(?:prepare the dataset again|Restore it)"):
        TextDataConfig(path=str(copy), sequence_length=32).build(seed=0).train.batch(range(2_000))


def test_verify_reports_all_damage_at_once(copy: Path) -> None:
    bit_flip_in_tokens(copy)
    (copy / "train-000002.tar").unlink()
    (copy / "tokenizer.json").write_text("{}")
    patch(copy / "validation-000000.tar", 600, flip, 1)
    found = "\n".join(find_damage(copy))
    assert all(name in found for name in (SHARD, "train-000002", "tokenizer.json", "validation-000000"))


def test_manifest_damage_is_noticed(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"vocab_size": 300', '"vocab_size": 299', 1))
    with pytest.raises(DamagedDataError, match="does not match its fingerprint"):
        Manifest.load(copy)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DamagedDataError, match="not a dataset manifest"):
        Manifest.load(copy)


def test_block_reader_refuses_ids_outside_the_vocabulary(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    manifest.content["tokenizer"]["vocab_size"] = 5
    with pytest.raises(DamagedDataError, match="outside the vocabulary of 5"):
        BlockReader(manifest, manifest.blocks("train")).read(0)


def archive(*entries: tuple[str, bytes]) -> bytes:
    parts = []
    for name, payload in entries:
        parts += [tar.member_header(name, len(payload)), payload, bytes(tar.padding_after(len(payload)))]
    return b"".join(parts) + tar.END_OF_ARCHIVE


def walk(data: bytes) -> list[tar.TarMember]:
    return list(tar.walk(io.BytesIO(data), "shard.tar"))


def test_walk_agrees_with_tarfile() -> None:
    data = archive(("a.tok.npy", b"x" * 700), ("b.tok.npy", b""), ("c.tok.npy", b"y" * 512))
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        expected = [(info.name, info.offset_data, info.size) for info in reference]
    assert [(m.name, m.offset, m.length) for m in walk(data)] == expected


def test_walk_accepts_record_padding() -> None:
    assert len(walk(archive(("a", b"x")) + bytes(10_240))) == 1


def pax_archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as out:
        info = tarfile.TarInfo("a")
        info.mtime = 0.5
        out.addfile(info)
    return stream.getvalue()


def link_archive() -> bytes:
    info = tarfile.TarInfo("a")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf(tarfile.USTAR_FORMAT) + tar.END_OF_ARCHIVE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(("a", b"x"), ("a", b"y")), "appears twice"),
        (archive(("../a", b"x")), "unsafe"),
        (archive(("/a", b"x")), "unsafe"),
        (pax_archive(), "not a regular file"),
        (link_archive(), "not a regular file"),
        (archive(("a", b"x"))[:-1024], "header cut short"),
        (archive(("a", b"x"))[:-512], "marker cut short"),
        (archive(("a", b"x")) + b"tail", "after the end"),
        (archive(("a", b"x" * 5_000))[:2_000], "ends inside member"),
        (b"", "header cut short"),
    ],
)
def test_walk_refuses(data: bytes, message: str) -> None:
    with pytest.raises(DamagedDataError, match=rf"shard\.tar.*{message}"):
        walk(data)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (pytest.fail, ("code from a data file ran",))


def saved(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "payload",
    [
        saved(np.array([Bomb()], dtype=object), allow_pickle=True),
        saved(np.arange(4, dtype=">u2")),
        saved(np.arange(4, dtype=np.float32)),
        saved(np.zeros((2, 2), dtype=np.uint16)),
        saved(np.arange(4, dtype=np.uint16))[:-1],
        b"PK\x03\x04 not npy at all",
    ],
)
def test_parse_npy_refuses(payload: bytes) -> None:
    with pytest.raises(ValueError):
        parse_npy(payload)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_npy_is_what_numpy_reads(dtype: str) -> None:
    array = np.arange(7, dtype=dtype)
    np.testing.assert_array_equal(np.load(io.BytesIO(npy_bytes(array)), allow_pickle=False), array)
    np.testing.assert_array_equal(parse_npy(saved(array)), array)
