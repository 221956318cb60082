"""What a training loop needs of data: the ``SampleSource`` protocol. NumPy only, so that any package can
provide one.

S = sequence length, B = rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class SampleSource(Protocol):
    """Rows of tokens by global sample index. ``batch`` is a pure function, so any rank may read any part of
    the order."""

    @property
    def fingerprint(self) -> str:
        """Digest of the data and of everything their order depends on."""

    @property
    def num_samples(self) -> int | None:
        """Number of rows; None when endless."""

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text behind all targets, for bits per byte; None when unknown or endless."""

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of these global samples.

        ``tokens`` int32 [B, S]; ``targets`` int32 [B, S], the token after each; ``loss_mask`` bool [B, S],
        False on padding; ``segment_ids`` int32 [B, S], 0, 1, 2, ... per document piece in the row and -1 on
        padding, which is always at the end; ``position_ids`` int32 [B, S], restarting with each piece.
        """

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """Where each piece of row ``index`` comes from: shard, member, document and more."""

    def close(self) -> None:
        """Release what is held."""


@dataclass(frozen=True)
class DataSources:
    """What a data component builds."""

    train: SampleSource
    validation: SampleSource | None
    tokenizer_path: str | None
