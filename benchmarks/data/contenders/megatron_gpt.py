"""Megatron-Core's ``GPTDataset`` over its own ``.bin``/``.idx``, memory-mapped, its index built for twenty epochs.

Variant ``full``: the dictionary that its training loop uses (tokens, labels, loss mask, position ids; attention mask
off). Variant ``tokens``: only the token row of each sample, through the same shuffled index.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

indexed: Any = importlib.import_module("megatron.core.datasets.indexed_dataset")
gpt: Any = importlib.import_module("megatron.core.datasets.gpt_dataset")
builder: Any = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")
_EPOCHS = 20


def convert(dataset: Path, out: Path, variant: str) -> None:
    """One ``IndexedDataset`` of uint16 documents, and the cached index over it."""
    common.fresh_folder(out)
    writer = indexed.IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.uint16)
    for tokens, offsets in common.blocks(dataset):
        writer.add_document(torch.from_numpy(tokens.astype(np.int32)), np.diff(offsets).tolist())
        # Documents of one call share an end; each is its own document here.
        del writer.document_indices[-1]
        writer.document_indices.extend(range(writer.document_indices[-1] + 1, len(writer.sequence_lengths) + 1))
    writer.finalize(str(out / "text.idx"))
    next(batches(dataset, out, variant, 0))  # builds the index of samples, which stays in its cache


class _Tokenizer:
    """What the data set configuration asks of a tokenizer."""

    vocab_size = 50_000
    eod = 1
    pad = -1
    unique_identifiers: dict[str, Any] = {"class": "benchmark"}  # noqa: RUF012


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Samples in the order of the built shuffle, eight in a batch."""
    text = indexed.IndexedDataset(str(out / "text"), mmap=True)
    samples = _EPOCHS * int(text.sequence_lengths.sum(dtype=np.int64)) // common.SEQUENCE_LENGTH
    config = gpt.GPTDatasetConfig(
        random_seed=common.SEED,
        sequence_length=common.SEQUENCE_LENGTH,
        blend=([str(out / "text")], None),
        split="1,0,0",
        path_to_cache=str(out / "cache"),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, [samples, 0, 0], lambda: True, config).build()
    items = train if variant == "full" else _TokensOnly(train)
    loader = torch.utils.data.DataLoader(items, batch_size=common.BATCH_ROWS, num_workers=workers, drop_last=True)
    while True:
        for batch in loader:
            yield batch["tokens"] if variant == "full" else batch
        yield None


class _TokensOnly(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        text, _ = self._dataset._query_document_sample_shuffle_indices(index)
        return torch.from_numpy(text)
