"""All kinds of damage that other readers were measured with, on text and on samples: verify names the member, a
reader stops before it or at it and never delivers anything but what was written, and an index of foreign shards
is refused."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_sets import archive, change, flipped, image_set, located, text_set, zeroed

from data_pipeline.errors import DamagedDataError
from data_pipeline.store.indexing import IndexFaultsError, index_folder
from data_pipeline.store.manifest import Manifest
from data_pipeline.store.reader import BlockReader
from data_pipeline.store.samples import read_sample
from data_pipeline.store.verify import find_damage

SHARD, OTHER = "train-000001.tar", "train-000002.tar"
# The member that is hit: the first of the second key, so that sound members lie before and after it.
HIT = 2


def hit(path: Path) -> tuple[str, int, int]:
    """Name, payload offset and length of the member that is hit, with enough payload to cut inside."""
    return located(path.read_bytes())[HIT]


def cut_inside_data(path: Path) -> None:
    _, offset, length = hit(path)
    path.write_bytes(path.read_bytes()[: offset + length // 2])


def cut_between_members(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: hit(path)[1] - 512])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: hit(path)[1] - 200])


def header_bit_flip(path: Path) -> None:
    change(path, hit(path)[1] - 512 + 3, 1, flipped)


def zeroed_sector_in_headers(path: Path) -> None:
    change(path, hit(path)[1] - 512, 512, zeroed)


def zeroed_sector_in_payload(path: Path) -> None:
    _, offset, length = hit(path)
    change(path, offset, min(length, 512), zeroed)


def payload_bit_flip(path: Path) -> None:
    _, offset, length = hit(path)
    change(path, offset + length - 1, 1, flipped)


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as reference:
        return [(info.name, reference.extractfile(info).read()) for info in reference]  # type: ignore[union-attr]


def missing_key(path: Path) -> None:
    members = members_of(path)
    del members[HIT]
    path.write_bytes(archive(members))


def duplicate_key(path: Path) -> None:
    members = members_of(path)
    members.insert(HIT, members[HIT])
    path.write_bytes(archive(members))


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (pytest.fail, ("code from a data file ran",))


def pickle_member(path: Path) -> None:
    members = members_of(path)
    key = members[HIT][0].partition(".")[0]
    members.insert(HIT + 1, (f"{key}.pyd", pickle.dumps(Bomb())))
    path.write_bytes(archive(members))


def missing_shard(path: Path) -> None:
    path.unlink()


def swapped_shards(path: Path) -> None:
    """Two shards exchange their names."""
    other = path.with_name(OTHER)
    mine, theirs = path.read_bytes(), other.read_bytes()
    size = max(len(mine), len(theirs))  # zeros after the end are part of tar: the sizes tell nothing
    path.write_bytes(theirs.ljust(size, b"\0"))
    other.write_bytes(mine.ljust(size, b"\0"))


ELEVEN = [
    cut_inside_data,
    cut_between_members,
    cut_in_header,
    header_bit_flip,
    zeroed_sector_in_headers,
    zeroed_sector_in_payload,
    payload_bit_flip,
    missing_key,
    duplicate_key,
    pickle_member,
    missing_shard,
    swapped_shards,
]
# What only a hash that was taken before can tell.
INVISIBLE_WITHOUT_HASHES = {zeroed_sector_in_payload, payload_bit_flip, missing_shard, swapped_shards}

Item = tuple[str, str, bytes]


def read_all(manifest: Manifest, opened: list[Any], delivered: list[Item]) -> None:
    """Read every member of ``opened``, blocks or samples, into ``delivered``."""
    if manifest.kind == "text":
        for index, arrays in enumerate(map(BlockReader(manifest, opened).read, range(len(opened)))):
            block = opened[index]
            delivered += [(block.shard, block.key, part.tobytes()) for part in (arrays.offsets, arrays.tokens)]
        return
    for sample in opened:
        delivered += [(sample.shard, sample.key, bytes(part)) for part in read_sample(manifest, sample).values()]


def open_all(manifest: Manifest) -> list[Any]:
    return manifest.blocks("train") if manifest.kind == "text" else manifest.samples("train")


@pytest.fixture(params=[text_set, image_set], ids=["text", "samples"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    return request.param(tmp_path / "set")


@pytest.mark.parametrize("damage", ELEVEN)
def test_verify_names_shard_and_place(manifest: Manifest, damage: Callable[[Path], None]) -> None:
    assert find_damage(manifest) == []
    path = manifest.folder / SHARD
    name, offset, length = hit(path)
    damage(path)
    faults = find_damage(manifest)
    assert faults
    assert all(SHARD in fault or (OTHER in fault and damage is swapped_shards) for fault in faults)
    assert all("What to do: " in fault for fault in faults)
    if path.exists() and path.stat().st_size == manifest.split("train")["shards"][1]["size"]:
        places = range(offset - 512, offset + length + 1)
        assert any(name in fault or any(f"byte {at}:" in fault for at in places) for fault in faults)


@pytest.mark.parametrize("damage", ELEVEN)
def test_opening_and_reading_raises_and_delivers_nothing_wrong(
    manifest: Manifest, damage: Callable[[Path], None]
) -> None:
    sound: list[Item] = []
    read_all(manifest, open_all(manifest), sound)
    damage(manifest.folder / SHARD)
    delivered: list[Item] = []
    with pytest.raises(DamagedDataError, match=r"train-00000[12].*What to do: ") as caught:
        read_all(manifest, open_all(manifest), delivered)
    assert caught.value.shard in (SHARD, OTHER)
    assert delivered == sound[: len(delivered)]


@pytest.mark.parametrize("damage", ELEVEN)
def test_reader_opened_before_the_damage_delivers_nothing_wrong(
    manifest: Manifest, damage: Callable[[Path], None]
) -> None:
    sound: list[Item] = []
    opened = open_all(manifest)
    read_all(manifest, opened, sound)
    damage(manifest.folder / SHARD)
    delivered: list[Item] = []
    with pytest.raises(DamagedDataError) as caught:
        read_all(manifest, opened, delivered)
    assert caught.value.shard == SHARD
    assert delivered == sound[: len(delivered)]
    # Only what lies in other shards or before the damaged member came through.
    assert len(delivered) <= sum(shard < SHARD for shard, _, _ in sound) + HIT


@pytest.mark.parametrize("damage", [d for d in ELEVEN if d not in INVISIBLE_WITHOUT_HASHES])
def test_index_refuses_what_was_damaged_before(
    manifest: Manifest, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number in range(3):
        name = f"train-{number:06d}.tar"
        (folder / name).write_bytes((manifest.folder / name).read_bytes())
    damage(folder / SHARD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(IndexFaultsError, match=rf"{SHARD}: byte \d+: .*What to do: "):
        index_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_index_then_verify_sees_what_only_hashes_tell(tmp_path: Path) -> None:
    manifest = image_set(tmp_path / "set")
    for path in manifest.folder.glob("*.json"):
        path.unlink()
    manifest = index_folder(manifest.folder).manifest
    assert find_damage(manifest) == []
    for damage in INVISIBLE_WITHOUT_HASHES:
        kept = {path: path.read_bytes() for path in manifest.folder.glob("*.tar")}
        damage(manifest.folder / SHARD)
        assert any(SHARD in fault for fault in find_damage(manifest))
        for path, data in kept.items():
            path.write_bytes(data)


def test_what_the_standard_reader_makes_of_a_bad_header(tmp_path: Path) -> None:
    """Why the walk is strict: the same damage ends the standard library's walk in silence."""
    manifest = text_set(tmp_path / "set")
    path = manifest.folder / SHARD
    whole = len(located(path.read_bytes()))
    header_bit_flip(path)
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as reference:
        assert len(reference.getmembers()) == HIT < whole
