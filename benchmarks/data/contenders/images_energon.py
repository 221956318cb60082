"""Megatron-Energon over the very shards that ours reads, indexed by ``energon prepare``. Variants: the decoder."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import cv2
import energon_text
import numpy as np
import torch
from image_decoding import BATCH, DECODERS, padded

energon: Any = importlib.import_module("megatron.energon")


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Link the shards and index them."""
    common.fresh_folder(out)
    for path in common.shards(dataset):
        (out / path.name).hardlink_to(path)
    energon_text.prepare_index(out)


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Endless; a shuffle buffer of 500 encoded samples."""
    cv2.setNumThreads(1)
    stream = energon.get_train_dataset(
        str(out),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        batch_drop_last=True,
        shuffle_buffer_size=500,
        max_samples_per_sequence=100,
        task_encoder=_Encoder(variant),
    )
    for batch in energon.get_loader(stream):
        yield batch.pixels


@energon.edataclass
class _Picture(energon.Sample):
    payload: Any
    caption: Any


@energon.edataclass
class _Batch(energon.Batch):
    pixels: Any
    captions: Any


@energon.stateless
def _cook(sample: dict[str, Any]) -> Any:
    caption = padded(common.npy_view(sample["tok.npy"]))
    return _Picture(**energon.basic_sample_keys(sample), payload=sample["jpg"], caption=caption)


class _Encoder(energon.DefaultTaskEncoder):
    decoder = None
    cookers = (energon.Cooker(_cook),)

    def __init__(self, decoder: str) -> None:
        super().__init__(batch_type=_Batch)
        self._decode = DECODERS[decoder]

    @energon.stateless
    def encode_sample(self, sample: Any) -> Any:
        sample.payload = self._decode(sample.payload)
        return sample

    def batch(self, samples: list[Any]) -> Any:
        return _Batch(
            __key__=[sample.__key__ for sample in samples],
            __restore_key__=[sample.__restore_key__ for sample in samples],
            pixels=torch.from_numpy(np.stack([sample.payload for sample in samples])),
            captions=torch.from_numpy(np.stack([sample.caption for sample in samples])),
        )
