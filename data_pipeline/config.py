"""The ``data`` components for text: config classes that the trainer checks and builds. Light at import."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from data_pipeline.fetch.settings import FetchSettings
    from data_pipeline.mixing import Phase
    from data_pipeline.source import DataSources
    from data_pipeline.store.manifest import Manifest
    from data_pipeline.text_build import CacheSettings

Violation = tuple[str, object, str, str]
"""(field, found, rule, fix)"""

_EXTENDABLE = {"extendable": True}


@dataclass(frozen=True, kw_only=True)
class AppendedConfig:
    """From global sample ``from_sample`` on, the shards that ``edition`` (a fingerprint) brings belong to the order."""

    from_sample: int
    edition: str


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How datasets at ``http(s)://`` and ``s3://`` are read; local folders need none of it.

    ``cache_folder`` is on a disk of the node and shared by all its processes; None takes one below the temporary
    folder. S3 credentials come from the usual environment variables and files, never from here.
    """

    cache_folder: str | None = None
    cache_gib: float = 64.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    deadline_s: float = 300.0
    requests_per_node: int = 64
    s3_endpoint: str | None = None
    s3_region: str | None = None
    s3_anonymous: bool = False

    def __post_init__(self) -> None:
        if not self.cache_gib > 0:
            raise ValueError(f"cache_gib is {self.cache_gib}, but must be above 0")
        self.settings()

    def settings(self) -> FetchSettings:
        """For the storages; raises ValueError for settings that cannot be."""
        from data_pipeline.fetch.settings import FetchSettings

        return FetchSettings(
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            deadline_s=self.deadline_s,
            requests_per_node=self.requests_per_node,
            s3_endpoint=self.s3_endpoint,
            s3_region=self.s3_region,
            s3_anonymous=self.s3_anonymous,
        )

    def cache(self) -> CacheSettings:
        """For the cache."""
        from data_pipeline.text_build import CacheSettings

        return CacheSettings(self.cache_folder, int(self.cache_gib * 2**30))


@dataclass(frozen=True, kw_only=True)
class _TextFields:
    """What one dataset and a mixture have in common.

    ``sequence_length`` counts positions (input tokens) in a row. ``num_lanes`` is the number of independent streams
    that the global order interleaves; None takes what the dataset recommends for its size. ``packing``: ``best_fit``
    within a segment, or ``concatenate`` and cut. ``on_damage``: ``stop``, or ``substitute`` rows that cannot be read,
    up to ``damage_budget`` rows in the run. ``reserve_segments`` segments are left out of the order to stand in for
    lost rows; with none, rows of other segments are repeated.
    """

    sequence_length: int
    num_lanes: int | None = None
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    reserve_segments: int = 0
    on_damage: Literal["stop", "substitute"] = field(default="stop", metadata=_EXTENDABLE)
    damage_budget: int = field(default=1000, metadata=_EXTENDABLE)
    fetch: FetchConfig = field(default_factory=FetchConfig, metadata=_EXTENDABLE)

    def _field_violations(self) -> Iterator[Violation]:
        if self.sequence_length < 2:
            yield "sequence_length", self.sequence_length, "must be at least 2", "set a length such as 512"
        if self.num_lanes is not None and self.num_lanes < 1:
            yield "num_lanes", self.num_lanes, "must be at least 1", "leave it out for the recommended number"
        for name in ("reserve_segments", "damage_budget"):
            if getattr(self, name) < 0:
                yield name, getattr(self, name), "must not be negative", "set 0 or more"

    @property
    def _packing(self) -> str:
        from data_pipeline.packing import BEST_FIT, CONCATENATE

        return CONCATENATE if self.packing == "concatenate" else BEST_FIT


def _load(path: str, fetch: FetchConfig, edition: str | None) -> Manifest:
    """The dataset at a path or URL, as it was in ``edition`` (None: as it is).

    Raises ValueError, DamagedDataError, FetchError.
    """
    from data_pipeline.fetch.storage import open_storage
    from data_pipeline.store.manifest import Manifest

    manifest = Manifest.load(path, open_storage(path, fetch.settings()))
    if manifest.kind != "text":
        raise ValueError(f"{path} is a dataset of {manifest.kind}, not of text. What to do: name a text dataset.")
    return manifest if edition is None else manifest.edition(edition)


def _path_violation(where: str, path: str, error: Exception) -> Violation:
    fix = f"pretrain data prepare stdlib {path} (or: prepare text SOURCE {path})"
    return where, path, str(error), fix


def _edition_violations(where: str, manifest: Manifest, base: str, appended: list[str]) -> Iterator[Violation]:
    """Appended editions must come after the base one, in the order in which the dataset had them."""
    known = [edition["fingerprint"] for edition in manifest.content.get("editions", [])] + [manifest.fingerprint]
    before = known.index(base)
    for number, edition in enumerate(appended):
        field = f"{where}[{number}].edition"
        if edition not in known:
            yield field, edition, "is no edition of the data set", f"its editions are {', '.join(known)}"
            return
        if known.index(edition) <= before:
            rule = f"must be later than {known[before]}, which the order holds already"
            yield field, edition, rule, f"editions, oldest first, are {', '.join(known)}"
            return
        before = known.index(edition)


def _num_segments(manifest: Manifest) -> int:
    return sum(shard["blocks"] for shard in manifest.split("train")["shards"])


def _tokenizer_path(manifest: Manifest, fetch: FetchConfig) -> str:
    """A local ``tokenizer.json``, its hash checked; that of a remote dataset is copied to the cache."""
    data = manifest.tokenizer_bytes()
    if manifest.is_local:
        return str(manifest.tokenizer_path)
    import os

    folder = fetch.cache().path()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tokenizer-{manifest.content['tokenizer']['hash']}.json"
    if not path.exists() or path.read_bytes() != data:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return str(path)


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(_TextFields):
    """Packed text from a dataset (folder or URL) made by ``pretrain data prepare``.

    ``edition`` is the fingerprint of the state of the dataset that the order begins with; None takes the present state,
    which is written down when a run is frozen. ``appended`` lists later editions and the global samples at which they
    take effect.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("path", "fetch.cache_folder")

    path: str = field(metadata=_EXTENDABLE)
    edition: str | None = None
    appended: tuple[AppendedConfig, ...] = field(default=(), metadata=_EXTENDABLE)

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        yield from self._field_violations()
        try:
            manifest = _load(self.path, self.fetch, None)
        except (ValueError, OSError) as error:
            yield _path_violation("path", self.path, error)
            return
        try:
            base = self.manifest()
        except ValueError:
            return  # another dataset: a new run says so when it is frozen, a continued one names the shard
        num_segments = _num_segments(base) - self.reserve_segments
        if self.num_lanes is not None and self.num_lanes > num_segments:
            rule = f"must not exceed the {num_segments} segments of the training split"
            yield "num_lanes", self.num_lanes, rule, "lower it, or leave it out"
        elif num_segments < 1:
            rule = f"leaves no segment of the {_num_segments(base)} of the training split"
            yield "reserve_segments", self.reserve_segments, rule, "keep a smaller reserve"
        starts = [item.from_sample for item in self.appended]
        if starts != sorted(set(starts)) or (starts and starts[0] < 0):
            yield "appended", starts, "from_sample must rise from entry to entry", "order them"
        yield from _edition_violations("appended", manifest, base.fingerprint, [i.edition for i in self.appended])

    def manifest(self) -> Manifest:
        """The dataset's manifest, as of ``edition``; raises ValueError when ``path`` holds no such one."""
        return _load(self.path, self.fetch, self.edition)

    @property
    def fingerprint(self) -> str:
        """Digest of the dataset's manifest; raises ValueError when ``path`` holds no sound dataset."""
        return self.manifest().fingerprint

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the dataset's tokenizer; raises ValueError when ``path`` holds no sound dataset."""
        return self.manifest().vocab_size

    def frozen(self) -> TextDataConfig:
        """With the present edition written down, so that shards appended later do not change a run by themselves."""
        return dataclasses.replace(self, edition=self.fingerprint)

    def datasets(self) -> dict[str, Any]:
        """Fingerprint and shards of the dataset as it is on disk, for comparison with what a run began with."""
        from data_pipeline.store.manifest import identities

        return identities({"text": _load(self.path, self.fetch, None)})

    def build(self, seed: int) -> DataSources:
        """Open the dataset; ``seed`` keys the order. ``validation`` is None when no document was held out.

        Raises ValueError, DamagedDataError and FetchError, as the parts do.
        """
        from data_pipeline.order import lane_positions
        from data_pipeline.quarantine import BadData
        from data_pipeline.source import DataSources
        from data_pipeline.text_build import (
            Appended,
            num_blocks,
            recommended_lanes,
            sequential_source,
            train_source,
        )

        manifest = self.manifest()
        bad_data = BadData(self.on_damage)
        lanes = self.num_lanes
        if lanes is None:
            lanes = recommended_lanes(manifest, num_blocks(manifest, "train") - self.reserve_segments)
        appended = [
            Appended(_load(self.path, self.fetch, item.edition), lane_positions(item.from_sample, lanes))
            for item in self.appended
        ]
        validation = None
        if "validation" in manifest.splits:
            validation = sequential_source(
                manifest,
                self.sequence_length,
                packing=self._packing,
                bad_data=bad_data.for_source("validation"),
                cache=self.fetch.cache(),
            )
        train = train_source(
            manifest,
            self.sequence_length,
            lanes,
            seed,
            packing=self._packing,
            appended=appended,
            reserve_segments=self.reserve_segments,
            bad_data=bad_data,
            cache=self.fetch.cache(),
        )
        train.timeline = self.timeline()
        return DataSources(train=train, validation=validation, tokenizer_path=_tokenizer_path(manifest, self.fetch))

    def timeline(self) -> list[list[Any]]:
        """What changes the order, as [from_sample, what]."""
        return [[item.from_sample, item.edition] for item in self.appended]

    def baselines(self) -> dict[str, float]:
        """What simple models make of the held-out text, in bits per byte; empty without a validation split."""
        from data_pipeline.baselines import bigram_bits_per_byte, xz_bits_per_byte

        manifest = self.manifest()
        if "validation" not in manifest.splits or not manifest.is_local:
            return {}
        return {
            "bigram_bits_per_byte": bigram_bits_per_byte(self.path),
            "xz_bits_per_byte": xz_bits_per_byte(self.path),
        }


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
class MixedTextConfig(_TextFields):
    """Several text datasets in one order, by weights that may change in phases.

    ``sources`` gives each dataset's folder or URL by name, ``weights`` the shares of rows (any positive scale) of a
    constant mix, or ``phases`` a list of them. All datasets must have the same tokenizer. ``num_lanes`` None takes the
    largest number that a dataset recommends; smaller datasets share lanes.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("sources", "fetch.cache_folder")

    sources: dict[str, str] = field(metadata=_EXTENDABLE)
    weights: dict[str, float] | None = None
    phases: tuple[PhaseConfig, ...] = field(default=(), metadata=_EXTENDABLE)
    editions: dict[str, str] = field(default_factory=dict)
    appended: tuple[MixedAppendedConfig, ...] = field(default=(), metadata=_EXTENDABLE)

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        from data_pipeline.mixing import phase_violations

        yield from self._field_violations()
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
                manifests[name] = _load(path, self.fetch, None)
            except (ValueError, OSError) as error:
                yield _path_violation(f"sources.{name}", path, error)
        yield from self._appended_violations(manifests)
        hashes = {name: manifest.content["tokenizer"]["hash"] for name, manifest in manifests.items()}
        first = next(iter(hashes.values()), None)
        for name, value in hashes.items():
            if value != first:
                rule = f"must have the tokenizer of source {next(iter(hashes))!r}"
                yield f"sources.{name}", self.sources[name], rule, "prepare it again with --tokenizer of that dataset"
            if _num_segments(manifests[name]) <= self.reserve_segments:
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

        return identities({name: _load(path, self.fetch, None) for name, path in self.sources.items()})

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
                    _load(self.sources[name], self.fetch, item.edition),
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
                packing=self._packing,
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
                packing=self._packing,
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
            tokenizer_path=_tokenizer_path(manifests[names[0]], self.fetch),
        )

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
            yield from _edition_violations(f"appended of {name}", manifest, base.fingerprint, editions)

    def _manifests(self) -> dict[str, Manifest]:
        return {name: _load(path, self.fetch, self.editions.get(name)) for name, path in self.sources.items()}

    def _phases(self) -> list[Phase]:
        from data_pipeline.mixing import Phase

        if self.weights is not None:
            return [Phase(0, self.weights)]
        return [Phase(phase.from_sample, phase.weights) for phase in self.phases]
