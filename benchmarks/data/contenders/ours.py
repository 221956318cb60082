"""Our pipeline through its public interface: global shuffle, best-fit packing and hashes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
import torch

import data_pipeline.text_build  # noqa: F401  (build() imports it; imports are timed apart)
from data_pipeline.config import TextDataConfig
from data_pipeline.loader import StepLoader


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Nothing: it reads the prepared data set itself."""


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Endless. ``variant`` may carry settings after colons: ``lean:lanes=16``."""
    kind, *settings = variant.split(":")
    lanes = next((int(text.removeprefix("lanes=")) for text in settings if text.startswith("lanes=")), None)
    yield from open_loader(dataset, 0, lanes, lean=kind == "lean")


def open_loader(
    dataset: Path, start_step: int, num_lanes: int | None = None, rows: int = common.BATCH_ROWS, lean: bool = False
) -> Iterator[torch.Tensor]:
    """Token tensors int32 [rows, S] from step ``start_step`` on; every array of a micro-batch becomes a tensor.

    Lean batches hold token ids in the stored dtype; they are widened here, in the training process. Targets, positions
    and masks follow from them and the lengths of the pieces, on the device.
    """
    config = TextDataConfig(path=str(dataset), sequence_length=common.SEQUENCE_LENGTH, num_lanes=num_lanes)
    source = config.build(seed=common.SEED).train
    with StepLoader(source, rows, rows, dp_rank=0, dp_size=1, start_step=start_step, lean=lean) as loader:
        for micro_batches in loader:
            for arrays in micro_batches:
                tokens = arrays["tokens"].astype(np.int32, copy=False)
                batch = {name: torch.from_numpy(array) for name, array in (arrays | {"tokens": tokens}).items()}
                yield batch["tokens"]
