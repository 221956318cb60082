"""Small datasets of both formats, written member by member, for the tests of the store."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from tokenizers import Tokenizer, models

from data_pipeline.store import tar
from data_pipeline.store.arrays import npy_bytes
from data_pipeline.store.manifest import SAMPLES_FORMAT, Manifest, digest_of_file, encode_manifest
from data_pipeline.store.sidecar import digest_of_bytes, encode_samples_sidecar

VOCABULARY = 50
Entries = Iterable[tuple[str, bytes]]


def archive(entries: Entries) -> bytes:
    """A tar as our writers write it."""
    parts = []
    for name, payload in entries:
        parts += [tar.member_header(name, len(payload)), payload, bytes(tar.padding_after(len(payload)))]
    return b"".join(parts) + tar.END_OF_ARCHIVE


def foreign_archive(entries: Entries, form: int = tarfile.PAX_FORMAT, mtime: float = 0.5) -> bytes:
    """A tar as the standard library writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as out:
        for name, payload in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), mtime
            out.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def located(data: bytes) -> list[tuple[str, int, int]]:
    """Name, payload offset and length of each member, from the standard library."""
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        return [(info.name, info.offset_data, info.size) for info in reference]


def write_tokenizer(folder: Path) -> dict[str, Any]:
    """A word-level tokenizer of 50 ids; returns the manifest's entry."""
    words = {"<|bos|>": 0, "<|eos|>": 1} | {f"w{n}": n for n in range(2, VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="w2")).save(str(folder / "tokenizer.json"))
    digest = digest_of_file(folder / "tokenizer.json")
    return {"hash": digest, "vocab_size": VOCABULARY, "bos_id": 0, "eos_id": 1}


def text_set(folder: Path, shards: int = 3, blocks: int = 3, with_bytes: bool = True) -> Manifest:
    """Text blocks: training shards ``train-000000.tar`` on, and one validation shard."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    splits = {}
    for split, count in (("train", shards), ("validation", 1)):
        entries = [text_shard(folder, f"{split}-{n:06d}.tar", n * blocks, blocks) for n in range(count)]
        names = ("documents", "bytes", "tokens", "blocks")
        splits[split] = {name: sum(entry[name] for entry in entries) for name in names} | {"shards": entries}
        if not with_bytes:
            for entry in entries:
                del entry["bytes"]
    content = {"dtype": "<u2", "block_tokens": 30, "num_lanes": 2, "tokenizer": tokenizer, "splits": splits}
    return write_manifest(folder, content, "pretrain-text-blocks")


def text_shard(folder: Path, name: str, first: int, blocks: int) -> dict[str, Any]:
    """One shard of blocks with its sidecar; returns its manifest entry. Documents differ from block to block."""
    members: list[tuple[str, bytes]] = []
    described = []
    for number in range(first, first + blocks):
        rng = np.random.default_rng([number, name.startswith("train")])
        lengths = rng.integers(3, 40, size=int(rng.integers(1, 6)))
        documents = [np.concatenate(([0], rng.integers(2, VOCABULARY, size=n - 2), [1])) for n in lengths]
        tokens = np.concatenate(documents).astype("<u2")
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype("<i8")
        key = f"{number:012d}"
        members += [(f"{key}.off.npy", npy_bytes(offsets)), (f"{key}.tok.npy", npy_bytes(tokens))]
        described.append(
            {"key": key, "tokens": len(tokens), "documents": len(lengths), "largest_id": int(tokens.max())}
        )
    data = archive(members)
    (folder / name).write_bytes(data)
    for block, entries in zip(described, _entries(members, data), strict=True):
        block["members"] = entries[1]
    sidecar = json.dumps({"shard": name, "size": len(data), "blocks": described}, indent=1).encode()
    (folder / name).with_suffix(".json").write_bytes(sidecar)
    return {
        "name": name,
        "size": len(data),
        "blocks": blocks,
        "documents": sum(block["documents"] for block in described),
        "tokens": sum(block["tokens"] for block in described),
        "bytes": 3 * sum(block["tokens"] for block in described),
        "largest_id": max(block["largest_id"] for block in described),
        "sidecar_hash": digest_of_bytes(sidecar),
    }


def jpeg(width: int, height: int, seed: int = 0, form: str = "JPEG") -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def image_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members of ``count`` samples of picture and caption."""
    found = []
    for number in range(first, first + count):
        found.append((f"{number:06d}.jpg", jpeg(16 + number, 24, number)))
        found.append((f"{number:06d}.txt", f"picture {number}".encode()))
    return found


def image_set(folder: Path, shards: int = 3, samples: int = 3) -> Manifest:
    """Images with captions as our own writers write them: plain headers, no ``frame`` in the sidecar."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(shards):
        name = f"train-{number:06d}.tar"
        members = image_members(number * samples, samples)
        data = archive(members)
        (folder / name).write_bytes(data)
        described = [
            {"key": key, "members": found, "attributes": {"width": 16 + int(key), "height": 24}}
            for key, found in _entries(members, data)
        ]
        sidecar = encode_samples_sidecar(name, len(data), described)
        (folder / name).with_suffix(".json").write_bytes(sidecar)
        size = sum(len(payload) for _, payload in members)
        entries.append(
            {
                "name": name,
                "size": len(data),
                "samples": samples,
                "bytes": size,
                "sidecar_hash": digest_of_bytes(sidecar),
            }
        )
    totals = {name: sum(entry[name] for entry in entries) for name in ("samples", "bytes")}
    content = {
        "kind": "images",
        "num_lanes": 2,
        "segment_bytes": 1000,
        "tokenizer": None,
        "splits": {
            "train": totals | {"shards": entries},
            "validation": {"samples": 0, "bytes": 0, "shards": []},
        },
    }
    return write_manifest(folder, content, SAMPLES_FORMAT)


def write_manifest(folder: Path, content: dict[str, Any], form: str) -> Manifest:
    """Write and load it."""
    origin = {"corpus": "test", "root": str(folder), "options": {}, "skipped": []}
    (folder / "manifest.json").write_bytes(encode_manifest(content, origin, form))
    return Manifest.load(folder)


def _entries(members: list[tuple[str, bytes]], data: bytes) -> list[tuple[str, dict[str, Any]]]:
    grouped: dict[str, dict[str, Any]] = {}
    for (name, payload), (_, offset, length) in zip(members, located(data), strict=True):
        key, _, extension = name.partition(".")
        entry = {"offset": offset, "length": length, "xxh3": xxhash.xxh3_64_hexdigest(payload)}
        grouped.setdefault(key, {})[extension] = entry
    return list(grouped.items())


def change(path: Path, at: int, length: int, how: Callable[[bytes], bytes]) -> None:
    """Replace ``length`` bytes at ``at`` by something else."""
    data = bytearray(path.read_bytes())
    old = bytes(data[at : at + length])
    new = how(old)
    assert len(new) == len(old) == length
    assert new != old
    data[at : at + length] = new
    path.write_bytes(data)


def flipped(old: bytes) -> bytes:
    """The lowest bit of the first byte flipped."""
    return bytes([old[0] ^ 1]) + old[1:]


def zeroed(old: bytes) -> bytes:
    """As many zeros."""
    return bytes(len(old))
