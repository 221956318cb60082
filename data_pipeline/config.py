"""The ``data`` component for one text dataset: a config class that the trainer checks and builds. Light at import."""

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
    from data_pipeline.source import DataSources
    from data_pipeline.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class TextDataConfig(TextFields):
    """Packed text from a dataset (folder or URL) made by ``pretrain data prepare``.

    ``edition`` is the fingerprint of the state of the dataset that the order begins with; None takes the present state,
    which is written down when a run is frozen. ``appended`` lists later editions and the global samples at which they
    take effect.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("path", "fetch.cache_folder")

    path: str = field(metadata=EXTENDABLE)
    edition: str | None = None
    appended: tuple[AppendedConfig, ...] = field(default=(), metadata=EXTENDABLE)

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        yield from self.field_violations()
        try:
            manifest = load_text(self.path, self.fetch, None)
        except (ValueError, OSError) as error:
            yield path_violation("path", self.path, error)
            return
        try:
            base = self.manifest()
        except ValueError:
            return  # another dataset: a new run says so when it is frozen, a continued one names the shard
        num_segments = training_segments(base) - self.reserve_segments
        if self.num_lanes is not None and self.num_lanes > num_segments:
            rule = f"must not exceed the {num_segments} segments of the training split"
            yield "num_lanes", self.num_lanes, rule, "lower it, or leave it out"
        elif num_segments < 1:
            rule = f"leaves no segment of the {training_segments(base)} of the training split"
            yield "reserve_segments", self.reserve_segments, rule, "keep a smaller reserve"
        starts = [item.from_sample for item in self.appended]
        if starts != sorted(set(starts)) or (starts and starts[0] < 0):
            yield "appended", starts, "from_sample must rise from entry to entry", "order them"
        yield from edition_violations("appended", manifest, base.fingerprint, [i.edition for i in self.appended])

    def manifest(self) -> Manifest:
        """The dataset's manifest, as of ``edition``; raises ValueError when ``path`` holds no such one."""
        return load_text(self.path, self.fetch, self.edition)

    def manifests(self) -> dict[str, Manifest]:
        """The dataset with everything that is appended to the order, by the name of :meth:`datasets`; raises as
        :meth:`manifest`."""
        return {"text": load_text(self.path, self.fetch, self.appended[-1].edition if self.appended else self.edition)}

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

        return identities({"text": load_text(self.path, self.fetch, None)})

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
            Appended(load_text(self.path, self.fetch, item.edition), lane_positions(item.from_sample, lanes))
            for item in self.appended
        ]
        validation = None
        if "validation" in manifest.splits:
            validation = sequential_source(
                manifest,
                self.sequence_length,
                packing=self.packing_rule,
                bad_data=bad_data.for_source("validation"),
                cache=self.fetch.cache(),
            )
        train = train_source(
            manifest,
            self.sequence_length,
            lanes,
            seed,
            packing=self.packing_rule,
            appended=appended,
            reserve_segments=self.reserve_segments,
            bad_data=bad_data,
            cache=self.fetch.cache(),
        )
        train.timeline = self.timeline()
        return DataSources(train=train, validation=validation, tokenizer_path=tokenizer_path_of(manifest, self.fetch))

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
