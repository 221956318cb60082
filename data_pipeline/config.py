"""The ``data`` component for text: a config class that the trainer checks and builds. Light at import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from data_pipeline.source import DataSources
    from data_pipeline.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class TextDataConfig:
    """Packed text from a folder made by ``pretrain data prepare``.

    ``sequence_length`` counts positions (input tokens) in a row. ``num_lanes`` is the number of independent
    streams that the global order interleaves; None takes what the dataset recommends for its size.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    sequence_length: int
    num_lanes: int | None = None

    def violations(self) -> Iterator[tuple[str, object, str, str]]:
        """Broken rules as (field, found, rule, fix)."""
        if self.sequence_length < 2:
            yield "sequence_length", self.sequence_length, "must be at least 2", "set a length such as 512"
        if self.num_lanes is not None and self.num_lanes < 1:
            yield "num_lanes", self.num_lanes, "must be at least 1", "leave it out for the recommended number"
        try:
            manifest = self.manifest()
        except ValueError as error:
            fix = f"pretrain data prepare stdlib {self.path} (or: prepare text SOURCE_FOLDER {self.path})"
            yield "path", self.path, str(error), fix
            return
        num_blocks = sum(shard["blocks"] for shard in manifest.split("train")["shards"])
        if self.num_lanes is not None and self.num_lanes > num_blocks:
            rule = f"must not exceed the {num_blocks} segments of the training split"
            yield "num_lanes", self.num_lanes, rule, "lower it, or leave it out"

    def manifest(self) -> Manifest:
        """The dataset's manifest; raises ValueError when ``path`` holds no sound one."""
        from data_pipeline.store.manifest import Manifest

        return Manifest.load(self.path)

    @property
    def fingerprint(self) -> str:
        """Digest of the dataset's manifest; raises ValueError when ``path`` holds no sound dataset."""
        return self.manifest().fingerprint

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the dataset's tokenizer; raises ValueError when ``path`` holds no sound dataset."""
        return self.manifest().vocab_size

    def build(self, seed: int) -> DataSources:
        """Open the dataset; ``seed`` keys the order. ``validation`` is None when no document was held out.

        Raises ValueError and DamagedDataError, as the parts do.
        """
        from data_pipeline.source import DataSources
        from data_pipeline.text_source import sequential_source, train_source

        manifest = self.manifest()
        validation = None
        if "validation" in manifest.splits:
            validation = sequential_source(manifest, self.sequence_length)
        return DataSources(
            train=train_source(manifest, self.sequence_length, self.num_lanes, seed),
            validation=validation,
            tokenizer_path=str(manifest.tokenizer_path),
        )

    def baselines(self) -> dict[str, float]:
        """What simple models make of the held-out text, in bits per byte; empty without a validation split."""
        from data_pipeline.baselines import bigram_bits_per_byte, xz_bits_per_byte

        if "validation" not in self.manifest().splits:
            return {}
        return {
            "bigram_bits_per_byte": bigram_bits_per_byte(self.path),
            "xz_bits_per_byte": xz_bits_per_byte(self.path),
        }
