"""Re-hash a whole dataset and collect every fault, instead of stopping at the first."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from data_pipeline.errors import DamagedDataError
from data_pipeline.fetch.storage import ByteRange
from data_pipeline.store import tar
from data_pipeline.store.frame import frame_hash, is_canonical
from data_pipeline.store.manifest import FORMAT, TOKENS_EXTENSION, Block, Manifest, Sample
from data_pipeline.store.parallel import map_shards
from data_pipeline.store.reader import BlockReader, check_member
from data_pipeline.store.sidecar import PREPARE_AGAIN, load_sidecar, url_of

Progress = Callable[[str, int, int], None]

_REMOTE_SHARDS_AT_ONCE = 2
_BLOCK_COUNTS = ("documents", "tokens")


def find_damage(
    location: str | os.PathLike[str] | Manifest, *, workers: int | None = None, progress: Progress | None = None
) -> list[str]:
    """All faults of the dataset in a folder or below a URL, one message each; an empty list means that it is what
    was written. ``progress`` is called with bytes of shards.

    Raises ValueError or DamagedDataError only when the manifest itself cannot be used; FetchError, OSError.
    """
    manifest = location if isinstance(location, Manifest) else Manifest.load(location)
    faults = [str(error) for error in dataset_faults(manifest)]
    shards = [shard for split in manifest.content["splits"].values() for shard in split["shards"]]
    total, done = sum(shard["size"] for shard in shards), 0
    for shard, found in zip(shards, _map(manifest, shards, total, workers), strict=True):
        faults.extend(found)
        done += shard["size"]
        if progress is not None:
            progress("verifying", done, total)
    return faults


def _map(manifest: Manifest, shards: list[dict[str, Any]], total: int, workers: int | None) -> Iterator[list[str]]:
    if manifest.is_local:
        check = functools.partial(_shard_faults_at, str(manifest.folder), manifest.fingerprint)
        yield from map_shards(check, shards, total, workers)
        return
    with ThreadPoolExecutor(_REMOTE_SHARDS_AT_ONCE, "verify") as pool:
        yield from pool.map(functools.partial(shard_faults, manifest), shards)


@functools.lru_cache(maxsize=1)
def _manifest_at(folder: str, fingerprint: str) -> Manifest:
    return Manifest.load(folder).edition(fingerprint)


def _shard_faults_at(folder: str, fingerprint: str, shard: dict[str, Any]) -> list[str]:
    return shard_faults(_manifest_at(folder, fingerprint), shard)


def dataset_faults(manifest: Manifest) -> Iterator[DamagedDataError]:
    """What is wrong with the manifest, its editions and the tokenizer; shards are not looked at."""
    if manifest.content.get("tokenizer") is not None:
        try:
            manifest.tokenizer_bytes()
        except DamagedDataError as error:
            yield error
    for name, split in manifest.content["splits"].items():
        for count, value in split.items():
            parts = [shard.get(count) for shard in split["shards"]]
            if count != "shards" and None not in parts and sum(parts) != value:
                yield DamagedDataError(
                    f"{manifest.location}: split {name} has {value} {count}, its shards {sum(parts)}. {PREPARE_AGAIN}"
                )
    for edition in manifest.content.get("editions", []):
        try:
            manifest.edition(edition["fingerprint"])
        except DamagedDataError as error:
            yield error


def shard_faults(manifest: Manifest, shard: dict[str, Any]) -> list[str]:
    """Every fault of one shard entry of the manifest: sidecar, archive, members, hashes, contents, counts."""
    try:
        sidecar = load_sidecar(manifest.storage, shard)
    except DamagedDataError as error:
        return [str(error)]
    label = url_of(manifest.storage, shard["name"])
    found: list[DamagedDataError] = []
    with _open(manifest, shard["name"]) as stream:
        found.extend(_archive_faults(stream, label, sidecar))
        check = _block_faults if manifest.format == FORMAT else _sample_faults
        found.extend(check(manifest, stream, label, shard, sidecar))
    messages: dict[object, str] = {}
    for fault in found:  # one damaged header is noticed by several checks: the first tells it best
        messages.setdefault(str(fault) if fault.byte is None else fault.byte, str(fault))
    return list(messages.values())


def _open(manifest: Manifest, name: str) -> BinaryIO:
    if manifest.is_local:
        return open(manifest.folder / name, "rb")
    return io.BytesIO(manifest.storage.read(name))


def _archive_faults(stream: BinaryIO, label: str, sidecar: dict[str, Any]) -> Iterator[DamagedDataError]:
    """The walk, the members it finds against the sidecar's, and every byte outside them."""
    listed = {
        entry["offset"]: (f"{item['key']}.{extension}", entry["length"])
        for item in sidecar["blocks" if "blocks" in sidecar else "samples"]
        for extension, entry in item["members"].items()
    }
    frame = sidecar.get("frame")
    faults: list[DamagedDataError] = []
    found = list(tar.walk(stream, label, foreign=frame is not None, report=faults.append))
    yield from faults
    for member in found:
        if member.offset not in listed or member.length != listed[member.offset][1]:
            yield tar.damaged(label, member.start, f"member {member.name!r} is not in the sidecar", member=member.name)
        elif frame is None and member.name != listed[member.offset][0]:
            problem = f"found member {member.name!r}, the sidecar says {listed[member.offset][0]!r}"
            yield tar.damaged(label, member.start, problem, member=member.name)
        elif frame is None and not is_canonical(stream, member):
            problem = f"the header of member {member.name!r} is not what was written"
            yield tar.damaged(label, member.start, problem, member=member.name)
    if not faults:
        for offset in sorted(listed.keys() - {member.offset for member in found}):
            name = listed[offset][0]
            yield tar.damaged(label, offset, f"member {name!r} of the sidecar is not there", member=name)
        if frame is not None:
            payloads = sorted((offset, length) for offset, (_, length) in listed.items())
            if frame_hash(stream, payloads, sidecar["size"]) != frame:
                problem = "the headers or padding between the members do not match their xxh3 hash in the sidecar"
                yield tar.damaged(label, 0, problem)


def _block_faults(
    manifest: Manifest, stream: BinaryIO, label: str, shard: dict[str, Any], sidecar: dict[str, Any]
) -> Iterator[DamagedDataError]:
    blocks = [Block(shard=shard["name"], **entry) for entry in sidecar["blocks"]]
    for block in blocks:
        payload, start = _read(stream, block.members)
        damaged = list(_member_faults(payload, start, label, block))
        yield from damaged
        if not damaged:
            try:
                arrays = BlockReader(manifest, [block], fetch=_given(payload, start)).read(0)
            except DamagedDataError as error:
                yield error
                continue
            largest = int(arrays.tokens.max(initial=0))
            if largest != block.largest_id:
                problem = f"block {block.key}: largest token id {largest}, the sidecar says {block.largest_id}"
                yield tar.damaged(label, start, problem, member=f"{block.key}.{TOKENS_EXTENSION}")
    counts = {name: sum(getattr(block, name) for block in blocks) for name in _BLOCK_COUNTS}
    counts["blocks"] = len(blocks)
    counts["largest_id"] = max((block.largest_id for block in blocks), default=0)
    yield from _count_faults(label, shard, counts)


def _sample_faults(
    manifest: Manifest, stream: BinaryIO, label: str, shard: dict[str, Any], sidecar: dict[str, Any]
) -> Iterator[DamagedDataError]:
    from data_pipeline.store.content import content_faults

    samples = [Sample(shard=shard["name"], **entry) for entry in sidecar["samples"]]
    for sample in samples:
        payload, start = _read(stream, sample.members)
        damaged = list(_member_faults(payload, start, label, sample))
        yield from damaged
        if damaged:
            continue
        members = {
            extension: payload[entry["offset"] - start : entry["offset"] - start + entry["length"]]
            for extension, entry in sample.members.items()
        }
        for extension, problem in content_faults(manifest.content, members, sample.attributes):
            name = f"{sample.key}.{extension}"
            byte = sample.members[extension]["offset"]
            yield tar.damaged(label, byte, f"member {name}: {problem}", member=name)
    sizes = [entry["length"] for sample in samples for entry in sample.members.values()]
    yield from _count_faults(label, shard, {"samples": len(samples), "bytes": sum(sizes)})


def _member_faults(payload: memoryview, start: int, label: str, item: Block | Sample) -> Iterator[DamagedDataError]:
    for extension, entry in item.members.items():
        try:
            check_member(payload, start, label, f"{item.key}.{extension}", entry)
        except DamagedDataError as error:
            yield error


def _read(stream: BinaryIO, members: dict[str, dict[str, Any]]) -> tuple[memoryview, int]:
    """The bytes from the first member's header to the end of the last payload, and where they begin."""
    start = min(entry["offset"] for entry in members.values()) - tar.BLOCK
    stream.seek(start)
    stop = max(entry["offset"] + entry["length"] for entry in members.values())
    return memoryview(stream.read(stop - start)), start


def _given(payload: memoryview, start: int) -> Callable[[ByteRange], bytes]:
    return lambda wanted: bytes(payload[wanted.start - start : wanted.stop - start])


def _count_faults(label: str, shard: dict[str, Any], counts: dict[str, int]) -> Iterable[DamagedDataError]:
    for name, value in counts.items():
        if shard[name] != value:
            yield DamagedDataError(
                f"{label}: {value} {name}, the manifest says {shard[name]}. {PREPARE_AGAIN}", shard=shard["name"]
            )
