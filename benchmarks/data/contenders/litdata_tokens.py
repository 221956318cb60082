"""``litdata``: ``optimize`` with its token loader, streamed shuffled from local chunks of 64 MB (2,049 x 16,384 ids).

Tokens are stored as uint16 ids and widened in the training process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import common
import litdata  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import torch
from litdata.streaming.item_loader import TokensLoader  # type: ignore[import-not-found, unused-ignore]

_CHUNK_ROWS = 1 << 12


def convert(dataset: Path, out: Path, variant: str) -> None:
    """One process, so that no document order is lost; each input is one shard."""
    common.fresh_folder(out)
    litdata.optimize(
        fn=_shard_tokens,
        inputs=[str(dataset)],
        output_dir=str(out / "chunks"),
        chunk_size=common.ROW * _CHUNK_ROWS,
        item_loader=TokensLoader(block_size=common.ROW),
        num_workers=1,
    )


def _shard_tokens(dataset: str) -> Iterator[torch.Tensor]:
    for tokens, _ in common.blocks(Path(dataset)):
        yield torch.from_numpy(tokens.astype(np.uint16))


def batches(dataset: Path, out: Path, variant: str, workers: int) -> Iterator[torch.Tensor | None]:
    """Epoch after epoch; the clock stops between them."""
    stream = litdata.StreamingDataset(
        str(out / "chunks"),
        item_loader=TokensLoader(block_size=common.ROW),
        shuffle=True,
        drop_last=True,
        seed=common.SEED,
    )
    loader = litdata.StreamingDataLoader(
        stream, batch_size=common.BATCH_ROWS, num_workers=workers, persistent_workers=bool(workers)
    )
    while True:
        yield from loader
        yield None
