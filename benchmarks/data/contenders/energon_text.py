"""Megatron-Energon as crude WebDataset, with a task encoder of its documented kind.

Variant ``blocks``: our own shards; each block is cut to rows, permuted, and handed out as whole batches by a
generating ``encode_sample``. Variant ``documents``: one document in a member (the tuned shards), a shuffle buffer of
1,000, packed by concatenating and cutting in its packing buffer.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

energon: Any = importlib.import_module("megatron.energon")
_PACKING_BUFFER = 256
_BATCH_TOKENS = common.BATCH_ROWS * common.ROW


def convert(dataset: Path, out: Path, variant: str) -> None:
    """Link the shards into a folder and let ``energon prepare`` index them."""
    common.fresh_folder(out)
    if variant == "blocks":
        for path in common.shards(dataset):
            (out / path.name).hardlink_to(path)
    else:
        import webdataset_documents

        webdataset_documents.convert(dataset, out, "tuned")
    prepare_index(out)


def prepare_index(out: Path) -> None:
    """``energon prepare`` on the shards in ``out``."""
    command = [
        str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--no-progress",
        "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset",
        "--num-workers", str(len(os.sched_getaffinity(0))), str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Endless."""
    blocks = variant == "blocks"
    stream = energon.get_train_dataset(
        str(out),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=None,
        packing_buffer_size=None if blocks else _PACKING_BUFFER,
        shuffle_buffer_size=None if blocks else 1000,
        max_samples_per_sequence=None if blocks else 100,
        task_encoder=_BlockEncoder() if blocks else _DocumentEncoder(),
    )
    for batch in energon.get_loader(stream):
        yield batch.tokens


@energon.edataclass
class _Tokens(energon.Sample):
    tokens: Any


@energon.stateless
def _cook_block(sample: dict[str, Any]) -> Any:
    return _Tokens(**energon.basic_sample_keys(sample), tokens=common.npy_view(sample["tok.npy"]))


@energon.stateless
def _cook_document(sample: dict[str, Any]) -> Any:
    return _Tokens(**energon.basic_sample_keys(sample), tokens=common.npy_view(sample["npy"]))


class _BlockEncoder(energon.DefaultTaskEncoder):
    decoder = None
    cookers = (energon.Cooker(_cook_block),)

    @energon.stateless
    def encode_sample(self, sample: Any) -> Iterator[Any]:
        generator = np.random.default_rng()
        for batch in common.shuffled_rows([sample.tokens], generator):
            yield _Tokens(
                __key__=sample.__key__,
                __restore_key__=sample.__restore_key__,
                tokens=torch.from_numpy(batch),
            )


class _DocumentEncoder(energon.DefaultTaskEncoder):
    decoder = None
    cookers = (energon.Cooker(_cook_document),)

    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        """Groups of consecutive documents that make at least one batch."""
        groups: list[list[Any]] = [[]]
        total = 0
        for sample in samples:
            groups[-1].append(sample)
            total += len(sample.tokens)
            if total >= _BATCH_TOKENS:
                groups.append([])
                total = 0
        return groups if groups[-1] else groups[:-1]

    @energon.stateless
    def pack_selected_samples(self, samples: list[Any]) -> Iterator[Any]:
        for batch in common.cut_into_batches(sample.tokens for sample in samples):
            yield _Tokens(__key__=samples[0].__key__, __restore_key__=(), tokens=torch.from_numpy(batch))
