"""``webdataset`` with one document in a member, the layout that its documentation shows.

Variant ``default``: ``TarWriter`` and ``.decode()`` as they come. Variant ``tuned``: plain ustar headers without the
PAX record of a fractional time stamp, and arrays viewed in place instead of decoded.
Both: shuffled shards, a shuffle buffer of 1,000 documents, concatenate and cut.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import webdataset

_SHARD_TOKENS = 1 << 23
_SHUFFLE = 1000


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Write every document as ``KEY.npy``, about eight million tokens a shard."""
    common.fresh_folder(out)
    write = _write_default if variant == "default" else _write_tuned
    group: list[tuple[str, np.ndarray]] = []
    tokens = shard = 0
    for number, document in enumerate(common.documents(dataset)):
        group.append((f"{number:09d}", document))
        tokens += len(document)
        if tokens >= _SHARD_TOKENS:
            write(out / f"train-{shard:06d}.tar", group)
            group, tokens, shard = [], 0, shard + 1
    if group:
        write(out / f"train-{shard:06d}.tar", group)


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Epoch after epoch."""
    urls = [str(path) for path in common.shards(out)]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=common.SEED, empty_check=False)
    pipeline = pipeline.shuffle(_SHUFFLE)
    pipeline = pipeline.decode().compose(_decoded) if variant == "default" else pipeline.compose(_viewed)
    pipeline = pipeline.repeat()
    if workers:
        pipeline = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    yield from pipeline


def _decoded(samples: Iterator[dict[str, Any]]) -> Iterator[torch.Tensor]:
    yield from map(torch.from_numpy, common.cut_into_batches(sample["npy"] for sample in samples))


def _viewed(samples: Iterator[dict[str, Any]]) -> Iterator[torch.Tensor]:
    documents = (common.npy_view(sample["npy"]) for sample in samples)
    yield from map(torch.from_numpy, common.cut_into_batches(documents))


def _write_default(path: Path, group: list[tuple[str, np.ndarray]]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for key, tokens in group:
            writer.write({"__key__": key, "npy": tokens})


def _write_tuned(path: Path, group: list[tuple[str, np.ndarray]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, tokens in group:
            payload = io.BytesIO()
            np.save(payload, tokens)
            member = tarfile.TarInfo(f"{key}.npy")
            member.size = payload.tell()
            payload.seek(0)
            archive.addfile(member, payload)
