"""VocabularyShard: which columns of the logits a tensor-parallel rank computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabularyShard:
    """Token ids ``[start, stop)``; the ranks of ``group`` together hold the whole vocabulary, in rank order."""

    start: int
    stop: int
    group: ProcessGroup
