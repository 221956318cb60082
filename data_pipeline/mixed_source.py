"""One order over several sources, and several finite sources one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from data_pipeline.batch import Arrays, concatenate_lean, unpack
from data_pipeline.mixing import Mixture
from data_pipeline.quarantine import BadData
from data_pipeline.source import SourcePart
from data_pipeline.text_source import Address, TextSource


class MixedSource:
    """An endless ``SampleSource``: global sample g is the row of the source that ``mixture`` names for it."""

    num_samples = None
    num_bytes = None

    def __init__(
        self, mixture: Mixture, names: Sequence[str], sources: Sequence[TextSource], fingerprint: str, bad_data: BadData
    ) -> None:
        self.fingerprint = fingerprint
        self.num_lanes = mixture.num_lanes
        self.bad_data = bad_data
        self.timeline: list[list[Any]] = []
        self.mixture = mixture
        self.names = list(names)
        self.sources = list(sources)

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch of all sources that hold a target."""
        rows = [source.rows_per_epoch for source in self.sources]
        return sum(source.fill * count for source, count in zip(self.sources, rows, strict=True)) / sum(rows)

    def batch(self, indices: Sequence[int]) -> Arrays:
        """Rows of global samples ``indices``; see :class:`data_pipeline.source.SampleSource`."""
        return unpack(self.lean(indices))

    def lean(self, indices: Sequence[int]) -> Arrays:
        """As :meth:`batch`, lean (:mod:`data_pipeline.batch`)."""
        addresses: list[list[Address]] = [[] for _ in self.sources]
        places: list[list[int]] = [[] for _ in self.sources]
        for out, index in enumerate(indices):
            place = self.mixture.locate(index)
            addresses[place.source].append((place.lane, place.position))
            places[place.source].append(out)
        asked = [number for number, wanted in enumerate(addresses) if wanted]
        batches = [self.sources[number].rows(addresses[number]) for number in asked]
        return concatenate_lean(batches, [places[number] for number in asked])

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """The provenance of the row in its source, with the name of the ``source``."""
        place = self.mixture.locate(index)
        pieces = self.sources[place.source].provenance_at(place.lane, place.position)
        return [{"source": self.names[place.source], **piece} for piece in pieces]

    def counters(self) -> dict[str, float]:
        """Sums of the sources' counters."""
        found = [source.counters() for source in self.sources]
        return {name: sum(counts.get(name, 0) for counts in found) for name in {n for counts in found for n in counts}}

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()


class ChainedSource:
    """A finite ``SampleSource``: all samples of the first source, then of the second, and so on."""

    def __init__(self, names: Sequence[str], sources: Sequence[TextSource], fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.names = list(names)
        self.sources = list(sources)
        counts = [source.num_samples or 0 for source in sources]
        self._starts = [0, *accumulate(counts)]
        self.num_samples = self._starts[-1]
        self.parts = [
            SourcePart(name, count, source.num_bytes)
            for name, count, source in zip(self.names, counts, sources, strict=True)
        ]
        self.num_bytes = sum(source.num_bytes or 0 for source in sources)
        self.fill = sum(source.fill * count for source, count in zip(sources, counts, strict=True)) / max(
            1, self.num_samples
        )

    def batch(self, indices: Sequence[int]) -> Arrays:
        """Rows of samples ``indices``; raises IndexError past the end."""
        return unpack(self.lean(indices))

    def lean(self, indices: Sequence[int]) -> Arrays:
        """As :meth:`batch`, lean."""
        places: list[list[int]] = [[] for _ in self.sources]
        for out, index in enumerate(indices):
            places[self._source(index)].append(out)
        asked = [number for number, rows in enumerate(places) if rows]
        batches = [
            self.sources[number].lean([indices[out] - self._starts[number] for out in places[number]])
            for number in asked
        ]
        return concatenate_lean(batches, [places[number] for number in asked])

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """The provenance of the row in its source, with the name of the ``source``."""
        number = self._source(index)
        pieces = self.sources[number].provenance(index - self._starts[number])
        return [{"source": self.names[number], **piece} for piece in pieces]

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()

    def _source(self, index: int) -> int:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} is outside the {self.num_samples} samples of this source")
        return bisect_right(self._starts, index) - 1
