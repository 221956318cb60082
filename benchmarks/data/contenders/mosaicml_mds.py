"""``mosaicml-streaming``: rows packed beforehand into MDS shards of 64 MB, local, shuffled, its own data loader.

Its package imports torchvision for data sets that are not used here; a CPU build of torch cannot load the usual wheel,
so empty stand-ins take its place.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
import torch
import transformers.feature_extraction_utils
import transformers.tokenization_utils_base  # noqa: F401  (both look for torchvision once, before the stand-ins)


def _stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


_stand_in("torchvision")
_stand_in("torchvision.datasets", VisionDataset=type("VisionDataset", (), {}))
_stand_in("torchvision.transforms")
_stand_in("torchvision.transforms.functional", to_tensor=None)
import streaming  # type: ignore[import-not-found, unused-ignore]  # noqa: E402


def convert(dataset: Path, out: Path, variant: str) -> None:
    """One row of 2,049 uint16 ids per sample, no compression, no hashes."""
    common.fresh_folder(out)
    columns = {"tokens": f"ndarray:uint16:{common.ROW}"}
    with streaming.MDSWriter(out=str(out / "mds"), columns=columns, size_limit=1 << 26) as writer:
        for batch in common.cut_into_batches(tokens for tokens, _ in common.blocks(dataset)):
            for row in batch.astype(np.uint16):
                writer.write({"tokens": row})


def clean_up() -> None:
    """Its shared memory and lock files outlive a process that is ended."""
    streaming.base.util.clean_stale_shared_memory()


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Epoch after epoch; the clock stops between them."""
    streaming.base.util.clean_stale_shared_memory()
    stream = streaming.StreamingDataset(
        local=str(out / "mds"),
        shuffle=True,
        shuffle_seed=common.SEED,
        batch_size=common.BATCH_ROWS,
        num_canonical_nodes=1,
        # All at once: its preparing thread then ends and no longer takes the interpreter from the reading one.
        predownload=1 << 20,
    )
    loader = streaming.StreamingDataLoader(
        stream, batch_size=common.BATCH_ROWS, num_workers=workers, persistent_workers=bool(workers)
    )
    while True:
        for batch in loader:
            yield batch["tokens"]
        yield None
