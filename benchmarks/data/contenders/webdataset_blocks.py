"""``webdataset`` over our own shards: members are blocks of about a million tokens.

Variant ``rows``: blocks of shuffled shards, cut to rows, rows of a block permuted. Variant ``documents``: documents of
a block permuted, then concatenated and cut. No hashes, no packing, no state, no global order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import webdataset


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Nothing: it reads our shards unchanged."""


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Epoch after epoch, each with its own order of shards."""
    urls = [str(path) for path in common.shards(dataset)]
    pack = _rows if variant == "rows" else _documents
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=common.SEED, empty_check=False)
    pipeline = pipeline.compose(pack).repeat()
    if workers:
        pipeline = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    yield from pipeline


def _rows(samples: Iterator[dict[str, Any]]) -> Iterator[torch.Tensor]:
    blocks = (common.npy_view(sample["tok.npy"]) for sample in samples)
    for batch in common.shuffled_rows(blocks, np.random.default_rng()):
        yield torch.from_numpy(batch)


def _documents(samples: Iterator[dict[str, Any]]) -> Iterator[torch.Tensor]:
    generator = np.random.default_rng()

    def shuffled() -> Iterator[np.ndarray]:
        for sample in samples:
            tokens = common.npy_view(sample["tok.npy"])
            spans = list(pairwise(common.npy_view(sample["off.npy"]).tolist()))
            yield np.concatenate([tokens[slice(*spans[i])] for i in generator.permutation(len(spans))])

    rest = np.empty(0, dtype=np.uint16)
    size = common.BATCH_ROWS * common.ROW
    for tokens in shuffled():
        tokens = np.concatenate((rest, tokens))
        stop = len(tokens) // size * size
        for start in range(0, stop, size):
            batch = tokens[start : start + size].reshape(common.BATCH_ROWS, common.ROW)
            yield torch.from_numpy(batch.astype(np.int32))
        rest = tokens[stop:]
