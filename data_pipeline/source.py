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
    """Rows by global sample index. ``batch`` is a pure function, so any rank may read any part of the order.

    A source may also have: ``lean(indices)``, its rows packed (:mod:`data_pipeline.batch`), which loaders then prefer;
    ``timeline``, a list of entries [from_sample, what], for an order that changes at declared samples;
    ``bad_data``, its policy for damage (:mod:`data_pipeline.quarantine`); ``fill``, the share of positions that hold a
    target; ``parts``, for a finite source, its samples in named runs one after the other, which validation reports one
    by one. Rows of one part have one length.
    """

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

        For text: see :func:`data_pipeline.batch.unpack`. At the least, whatever the objective reads.
        """

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """Where each piece of row ``index`` comes from: shard, member, document and more."""

    def close(self) -> None:
        """Release what is held."""


@dataclass(frozen=True)
class SourcePart:
    """A run of samples of a finite source: ``num_bytes`` as that of the source."""

    name: str
    num_samples: int
    num_bytes: int | None = None


@dataclass(frozen=True)
class DataSources:
    """What a data component builds."""

    train: SampleSource
    validation: SampleSource | None
    tokenizer_path: str | None
