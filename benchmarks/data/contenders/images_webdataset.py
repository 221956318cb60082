"""``webdataset`` over the very shards that ours reads, batches made in its worker processes. Variants: the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import cv2
import numpy as np
import torch
import webdataset
from image_decoding import BATCH, DECODERS, padded


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Nothing: it reads our shards unchanged."""


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Epoch after epoch; shuffled shards and a shuffle buffer of 500 encoded samples."""
    cv2.setNumThreads(1)
    decode = DECODERS[variant]
    urls = [str(path) for path in common.shards(dataset)]

    def loaded(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return decode(sample["jpg"]), padded(common.npy_view(sample["tok.npy"]))

    def collated(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, captions = zip(*samples, strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(captions))

    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=common.SEED, empty_check=False)
    pipeline = pipeline.repeat().shuffle(500).map(loaded).batched(BATCH, collation_fn=collated, partial=False)
    if workers:
        pipeline = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    for images, _ in pipeline:
        yield images
