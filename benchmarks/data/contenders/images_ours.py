"""Our images with captions through the public interface: global order, hashes on; ``workers`` decode threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import common
import torch
from image_decoding import BATCH, CAPTION_TOKENS, SIZE

from data_pipeline.loader import StepLoader
from data_pipeline.media.config import ImageDataConfig


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Nothing: it reads the prepared data set itself."""


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Endless; uint8 [32, 256, 256, 3], with caption ids beside."""
    config = ImageDataConfig(path=str(dataset), size=SIZE, caption_tokens=CAPTION_TOKENS, workers=workers)
    source = config.build(seed=common.SEED).train
    with StepLoader(source, BATCH, BATCH, dp_rank=0, dp_size=1) as loader:
        for micro_batches in loader:
            for arrays in micro_batches:
                batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
                yield batch["images"]
