"""Text datasets straight from random tokens: no tokenizer is trained, and what each document holds is known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.prepare.writer import ShardWriter
from data_pipeline.store.editions import appended
from data_pipeline.store.manifest import MANIFEST_NAME, Manifest, digest_of_bytes, encode_manifest

VOCAB_SIZE = 1000
_TOKENIZER = b'{"no": "tokenizer"}'


def random_documents(num_documents: int, seed: int, longest: int = 60) -> list[np.ndarray]:
    """Documents of 2 to ``longest`` tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, num_documents)
    return [rng.integers(0, VOCAB_SIZE, length).astype("<u2") for length in lengths]


def write_shards(
    folder: Path, split: str, documents: Sequence[np.ndarray], block_tokens: int, blocks_per_shard: int, first: int = 0
) -> list[dict[str, Any]]:
    """Shards and sidecars of ``documents``; returns their entries for the manifest."""
    groups: list[list[np.ndarray]] = [[]]
    for document in documents:
        if sum(map(len, groups[-1])) >= block_tokens:
            groups.append([])
        groups[-1].append(document)
    entries = []
    for number, start in enumerate(range(0, len(groups), blocks_per_shard), start=first):
        name = f"{split}-{number:06d}.tar"
        stream = io.BytesIO()
        writer = ShardWriter(stream, name, number)
        for group in groups[start : start + blocks_per_shard]:
            writer.add_block(np.concatenate(group), np.array([len(d) for d in group]), sum(map(len, group)))
        entry, sidecar = writer.finish()
        (folder / name).write_bytes(stream.getvalue())
        (folder / name).with_suffix(".json").write_bytes(sidecar)
        entries.append(entry)
    return entries


def write_dataset(
    folder: Path,
    num_documents: int = 200,
    seed: int = 0,
    *,
    block_tokens: int = 200,
    blocks_per_shard: int = 7,
    num_lanes: int = 4,
    validation: int = 20,
    longest: int = 60,
) -> Path:
    """A dataset in the new ``folder``."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(_TOKENIZER)
    splits = {}
    for split, count, key in (("train", num_documents, seed), ("validation", validation, seed + 1000)):
        documents = random_documents(count, key, longest)
        shards = write_shards(folder, split, documents, block_tokens, blocks_per_shard) if documents else []
        splits[split] = {
            "documents": count,
            **{name: sum(shard[name] for shard in shards) for name in ("tokens", "bytes", "blocks")},
            "shards": shards,
        }
    content = {
        "dtype": "<u2",
        "block_tokens": block_tokens,
        "num_lanes": num_lanes,
        "tokenizer": {
            "hash": digest_of_bytes(_TOKENIZER),
            "vocab_size": VOCAB_SIZE,
            "bos_id": 0,
            "eos_id": 1,
        },
        "splits": splits,
    }
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(content, {"options": {}, "skipped": []}))
    return folder


def append_documents(folder: Path, num_documents: int, seed: int) -> str:
    """Append shards to the dataset in ``folder``; returns its new fingerprint."""
    manifest = Manifest.load(folder)
    block_tokens = manifest.content["block_tokens"]
    first = len(manifest.split("train")["shards"])
    shards = write_shards(folder, "train", random_documents(num_documents, seed), block_tokens, 7, first)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(appended(manifest, shards), manifest.origin))
    return Manifest.load(folder).fingerprint
