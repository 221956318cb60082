"""The ``data`` component for several text datasets in one order. Light at import."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from data_pipeline.config_common import (
    EXTENDABLE,
    AppendedConfig,
    TextFields,
    Violation,
    edition_violations,
    load_text,
    path_violation,
    tokenizer_path_of,
    training_segments,
)

if TYPE_CHECKING:
    from data_pipeline.mixing import Phase
    from data_pipeline.source import DataSources
    from data_pipeline.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """``weights`` by source hold from global sample ``from_sample`` on."""

    from_sample: int
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class MixedAppendedConfig(AppendedConfig):
    """As AppendedConfig, for the data set that is called ``source``."""

    source: str


@dataclass(frozen=True, kw_only=True)
class MixedTextConfig(TextFields):
    """Several text datasets in one order, by weights that may change in phases.

    ``sources`` gives each dataset's folder or URL by name, ``weights`` the shares of rows (any positive scale) of a
    constant mix, or ``phases`` a list of them. All datasets must have the same tokenizer. ``num_lanes`` None takes the
    largest number that a dataset recommends; smaller datasets share lanes.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("sources", "fetch.cache_folder")

    sources: dict[str, str] = field(metadata=EXTENDABLE)
    weights: dict[str, float] | None = None
    phases: tuple[PhaseConfig, ...] = field(default=(), metadata=EXTENDABLE)
    editions: dict[str, str] = field(default_factory=dict)
    appended: tuple[MixedAppendedConfig, ...] = field(default=(), metadata=EXTENDABLE)

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        from data_pipeline.mixing import phase_violations

        yield from self.field_violations()
        if not self.sources:
            yield "sources", self.sources, "needs at least one dataset", "sources: {code: data/code, web: data/web}"
            return
        if (self.weights is None) == (not self.phases):
            rule = "exactly one of weights and phases must be given"
            fix = "weights: {code: 1, web: 3}, or phases: [{from_sample: 0, weights: ...}]"
            yield "weights", self.weights, rule, fix
        else:
            for where, found, rule, fix in phase_violations(list(self.sources), self._phases()):
                yield (where if self.phases else where.replace("phases[0].", "")), found, rule, fix
        manifests = {}
        for name, path in self.sources.items():
            try:
                manifests[name] = load_text(path, self.fetch, None)
            except (ValueError, OSError) as error:
                yield path_violation(f"sources.{name}", path, error)
        yield from self._appended_violations(manifests)
        hashes = {name: manifest.content["tokenizer"]["hash"] for name, manifest in manifests.items()}
        first = next(iter(hashes.values()), None)
        for name, value in hashes.items():
            if value != first:
                rule = f"must have the tokenizer of source {next(iter(hashes))!r}"
                yield f"sources.{name}", self.sources[name], rule, "prepare it again with --tokenizer of that dataset"
            if training_segments(manifests[name]) <= self.reserve_segments:
                rule = f"leaves no segment of source {name!r}"
                yield "reserve_segments", self.reserve_segments, rule, "keep a smaller reserve"

    @property
    def fingerprint(self) -> str:
        """Digest of all manifests."""
        from data_pipeline.store.manifest import digest_of

        return digest_of({name: manifest.fingerprint for name, manifest in self._manifests().items()})

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the datasets' tokenizer."""
        return next(iter(self._manifests().values())).vocab_size

    def frozen(self) -> MixedTextConfig:
        """With the present editions written down."""
        editions = {name: manifest.fingerprint for name, manifest in self._manifests().items()}
        return dataclasses.replace(self, editions=editions)

    def datasets(self) -> dict[str, Any]:
        """Fingerprint and shards of each dataset as it is on disk."""
        from data_pipeline.store.manifest import identities

        return identities({name: load_text(path, self.fetch, None) for name, path in self.sources.items()})

    def build(self, seed: int) -> DataSources:
        """Open all datasets; the validation set is theirs, one after the other. Raises as TextDataConfig.build."""
        from data_pipeline.mixed_source import ChainedSource, MixedSource
        from data_pipeline.mixing import MIXING, Mixture
        from data_pipeline.quarantine import BadData
        from data_pipeline.source import DataSources
        from data_pipeline.store.manifest import digest_of
        from data_pipeline.text_build import (
            Appended,
            num_blocks,
            recommended_lanes,
            sequential_source,
            train_source,
        )

        manifests = self._manifests()
        names = list(manifests)
        segments = {name: num_blocks(manifests[name], "train") - self.reserve_segments for name in names}
        lanes = self.num_lanes or max(recommended_lanes(manifests[name], segments[name]) for name in names)
        own = [max(d for d in range(1, min(lanes, segments[name]) + 1) if lanes % d == 0) for name in names]
        mixture = Mixture(names, own, lanes, self._phases())
        appended = {
            name: [
                Appended(
                    load_text(self.sources[name], self.fetch, item.edition),
                    mixture.source_positions(number, item.from_sample),
                )
                for item in self.appended
                if item.source == name
            ]
            for number, name in enumerate(names)
        }
        bad_data = BadData(self.on_damage)
        trains = [
            train_source(
                manifests[name],
                self.sequence_length,
                count,
                f"{seed} {name}",  # equal permutations in two sources would be no harm, but no need either
                packing=self.packing_rule,
                reserve_segments=self.reserve_segments,
                appended=appended[name],
                bad_data=bad_data.for_source(name),
                cache=self.fetch.cache(),
            )
            for name, count in zip(names, own, strict=True)
        ]
        held_out = [name for name in names if "validation" in manifests[name].splits]
        validations = [
            sequential_source(
                manifests[name],
                self.sequence_length,
                packing=self.packing_rule,
                bad_data=bad_data.for_source(f"{name}, validation"),
                cache=self.fetch.cache(),
            )
            for name in held_out
        ]
        order = {name: [source.fingerprint, source.num_lanes] for name, source in zip(names, trains, strict=True)}
        train = MixedSource(mixture, names, trains, digest_of([order, names, lanes, MIXING]), bad_data)
        train.timeline = self.timeline()
        chained = ChainedSource(held_out, validations, digest_of([v.fingerprint for v in validations]))
        return DataSources(
            train=train,
            validation=chained if validations else None,
            tokenizer_path=tokenizer_path_of(manifests[names[0]], self.fetch),
        )

    def manifests(self) -> dict[str, Manifest]:
        """The datasets by the names of their sources, each with everything that is appended to the order; raises
        ValueError when a path holds no sound dataset."""
        editions = {**self.editions, **{item.source: item.edition for item in self.appended}}
        return {name: load_text(path, self.fetch, editions.get(name)) for name, path in self.sources.items()}

    def timeline(self) -> list[list[Any]]:
        """What changes the order, as [from_sample, what], in the order of samples."""
        events: list[list[Any]] = [[phase.from_sample, dict(sorted(phase.weights.items()))] for phase in self._phases()]
        events += [[item.from_sample, {"source": item.source, "edition": item.edition}] for item in self.appended]
        return sorted(events, key=lambda event: int(event[0]))

    def _appended_violations(self, manifests: dict[str, Manifest]) -> Iterator[Violation]:
        for name in {item.source for item in self.appended} - set(self.sources):
            yield "appended", name, "names no source", f"sources are {', '.join(self.sources)}"
        for name in set(self.editions) - set(self.sources):
            yield "editions", name, "names no source", f"sources are {', '.join(self.sources)}"
        for name, manifest in manifests.items():
            own = [item for item in self.appended if item.source == name]
            starts = [item.from_sample for item in own]
            if starts != sorted(set(starts)) or (starts and starts[0] < 0):
                yield "appended", starts, f"from_sample of source {name!r} must rise from entry to entry", "order them"
            try:
                base = manifest.edition(self.editions.get(name, manifest.fingerprint))
            except ValueError:
                continue  # another dataset: told when the run's own record of it is compared
            editions = [item.edition for item in own]
            yield from edition_violations(f"appended of {name}", manifest, base.fingerprint, editions)

    def _manifests(self) -> dict[str, Manifest]:
        return {name: load_text(path, self.fetch, self.editions.get(name)) for name, path in self.sources.items()}

    def _phases(self) -> list[Phase]:
        from data_pipeline.mixing import Phase

        if self.weights is not None:
            return [Phase(0, self.weights)]
        return [Phase(phase.from_sample, phase.weights) for phase in self.phases]
