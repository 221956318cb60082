"""What the ``data`` components have in common: settings of fetching, fields of text, rules. Light at import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from data_pipeline.fetch.settings import FetchSettings
    from data_pipeline.store.manifest import Manifest
    from data_pipeline.text_build import CacheSettings

Violation = tuple[str, object, str, str]
"""(field, found, rule, fix)"""

EXTENDABLE = {"extendable": True}
"""Metadata of fields that a continued run may change."""


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
class TextFields:
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
    on_damage: Literal["stop", "substitute"] = field(default="stop", metadata=EXTENDABLE)
    damage_budget: int = field(default=1000, metadata=EXTENDABLE)
    fetch: FetchConfig = field(default_factory=FetchConfig, metadata=EXTENDABLE)

    def field_violations(self) -> Iterator[Violation]:
        if self.sequence_length < 2:
            yield "sequence_length", self.sequence_length, "must be at least 2", "set a length such as 512"
        if self.num_lanes is not None and self.num_lanes < 1:
            yield "num_lanes", self.num_lanes, "must be at least 1", "leave it out for the recommended number"
        for name in ("reserve_segments", "damage_budget"):
            if getattr(self, name) < 0:
                yield name, getattr(self, name), "must not be negative", "set 0 or more"

    @property
    def packing_rule(self) -> str:
        from data_pipeline.packing import BEST_FIT, CONCATENATE

        return CONCATENATE if self.packing == "concatenate" else BEST_FIT


def load_text(path: str, fetch: FetchConfig, edition: str | None) -> Manifest:
    """The dataset at a path or URL, as it was in ``edition`` (None: as it is).

    Raises ValueError, DamagedDataError, FetchError.
    """
    from data_pipeline.fetch.storage import open_storage
    from data_pipeline.store.manifest import Manifest

    manifest = Manifest.load(path, open_storage(path, fetch.settings()))
    if manifest.kind != "text":
        raise ValueError(f"{path} is a dataset of {manifest.kind}, not of text. What to do: name a text dataset.")
    return manifest if edition is None else manifest.edition(edition)


def path_violation(where: str, path: str, error: Exception) -> Violation:
    fix = f"pretrain data prepare stdlib {path} (or: prepare text SOURCE {path})"
    return where, path, str(error), fix


def edition_violations(where: str, manifest: Manifest, base: str, appended: list[str]) -> Iterator[Violation]:
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


def training_segments(manifest: Manifest) -> int:
    return sum(shard["blocks"] for shard in manifest.split("train")["shards"])


def tokenizer_path_of(manifest: Manifest, fetch: FetchConfig) -> str:
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
