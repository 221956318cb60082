"""The ``data`` components for media: config classes that the trainer checks and builds. Light at import."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_pipeline.config_common import FetchConfig, Violation

if TYPE_CHECKING:
    from data_pipeline.media.build import Access
    from data_pipeline.media.decode import ImageTransform, Limits
    from data_pipeline.media.packing import SpanLayout
    from data_pipeline.source import DataSources
    from data_pipeline.store.manifest import Manifest

_EXTENDABLE = {"extendable": True}
_ROWS_WANTED, _FEWEST_LANES = 32, 4


@dataclass(frozen=True, kw_only=True)
class _MediaFields:
    """What all datasets of media have in common.

    ``path`` is a folder or URL made by ``pretrain data prepare`` (or ``index``). ``num_lanes`` and ``segment_bytes``
    None take what the dataset recommends. ``workers`` threads decode (None: the usable cores, at most eight; 0: the
    calling thread); their number changes no batch. What is larger than ``max_pixels`` or ``max_bytes`` counts as
    damaged; the limits do not change the order. ``on_damage``: ``stop``, or ``substitute`` samples that cannot be
    read by others, up to ``damage_budget`` of them in the run.
    """

    path_fields: ClassVar[tuple[str, ...]] = ("path", "fetch.cache_folder")
    kinds: ClassVar[tuple[str, ...]] = ()

    path: str = field(metadata=_EXTENDABLE)
    edition: str | None = None
    num_lanes: int | None = None
    segment_bytes: int | None = None
    workers: int | None = field(default=None, metadata=_EXTENDABLE)
    max_pixels: int = field(default=1 << 26, metadata=_EXTENDABLE)
    max_bytes: int = field(default=1 << 26, metadata=_EXTENDABLE)
    on_damage: Literal["stop", "substitute"] = field(default="stop", metadata=_EXTENDABLE)
    damage_budget: int = field(default=1000, metadata=_EXTENDABLE)
    fetch: FetchConfig = field(default_factory=FetchConfig, metadata=_EXTENDABLE)

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        for name in ("num_lanes", "segment_bytes", "max_pixels", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield name, value, "must be at least 1", "leave it out for the default"
        for name in ("workers", "damage_budget"):
            value = getattr(self, name)
            if value is not None and value < 0:
                yield name, value, "must not be negative", "set 0 or more"
        try:
            manifest = self.manifest()
        except (ValueError, OSError) as error:
            fix = f"pretrain data prepare {self.kinds[0]} SOURCE {self.path}"
            yield "path", self.path, str(error), fix
            return
        yield from self._manifest_violations(manifest)

    def _manifest_violations(self, manifest: Manifest) -> Iterator[Violation]:
        samples = manifest.split("train")["samples"]
        if self.num_lanes is not None and self.num_lanes > samples:
            rule = f"must not exceed the {samples} samples of the training split"
            yield "num_lanes", self.num_lanes, rule, "lower it, or leave it out"

    def manifest(self) -> Manifest:
        """The dataset's manifest, as of ``edition``; raises ValueError when ``path`` holds no such one."""
        return self._load(self.edition)

    def manifests(self) -> dict[str, Manifest]:
        """The dataset by the name of :meth:`datasets`; raises as :meth:`manifest`."""
        return {self.kinds[0]: self.manifest()}

    def _load(self, edition: str | None) -> Manifest:
        from data_pipeline.fetch.storage import open_storage
        from data_pipeline.store.manifest import Manifest

        manifest = Manifest.load(self.path, open_storage(self.path, self.fetch.settings()))
        if manifest.kind not in self.kinds:
            wanted = " or ".join(self.kinds)
            raise ValueError(
                f"{self.path} is a dataset of kind {manifest.kind}, expected {wanted}. What to do: name another, or "
                "choose the data component of its kind."
            )
        return manifest if edition is None else manifest.edition(edition)

    @property
    def fingerprint(self) -> str:
        """Digest of the dataset's manifest; raises ValueError when ``path`` holds no sound dataset."""
        return self.manifest().fingerprint

    def frozen(self) -> Any:
        """With the present edition written down, so that shards appended later do not change a run by themselves."""
        return self if self.edition is not None else dataclasses.replace(self, edition=self.fingerprint)

    def datasets(self) -> dict[str, Any]:
        """Fingerprint and shards of the dataset as it is stored, for comparison with what a run began with."""
        from data_pipeline.store.manifest import identities

        return identities({self.kinds[0]: self._load(None)})

    def baselines(self) -> dict[str, float]:
        """Simple models to compare with: none."""
        return {}

    def _limits(self) -> Limits:
        from data_pipeline.media.decode import Limits

        return Limits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)

    def _access(self) -> Access:
        from data_pipeline.media.build import Access
        from data_pipeline.quarantine import BadData

        return Access(workers=self.workers, bad_data=BadData(self.on_damage), cache=self.fetch.cache())

    def _tokenizer_path(self, manifest: Manifest) -> str | None:
        return str(manifest.tokenizer_path) if manifest.content["tokenizer"] and manifest.is_local else None


def _caption_violations(caption_tokens: int | None, manifest: Manifest) -> Iterator[Violation]:
    if caption_tokens is not None and caption_tokens < 1:
        yield "caption_tokens", caption_tokens, "must be at least 1", "leave it out to get no captions"
    if caption_tokens is not None and not manifest.content["tokenizer"]:
        rule = "needs a dataset whose captions are tokenised"
        yield "caption_tokens", caption_tokens, rule, "prepare it with --tokenizer, or leave caption_tokens out"


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(_MediaFields):
    """Images with captions.

    The shorter side is resized to ``resize`` (None: ``size``), then a square of ``size`` pixels is cropped from the
    ``center`` or at ``random``, and mirrored at random with ``flip``. Validation always takes the center, unmirrored.
    ``channels_first`` gives [B, 3, size, size]. ``caption_tokens`` is the length captions are padded or cut to; None
    leaves them out.
    """

    kinds: ClassVar[tuple[str, ...]] = ("images", "foreign")

    size: int
    resize: int | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    channels_first: bool = False
    caption_tokens: int | None = None

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        yield from self._transform().violations()
        yield from super().violations()

    def _manifest_violations(self, manifest: Manifest) -> Iterator[Violation]:
        yield from super()._manifest_violations(manifest)
        yield from _caption_violations(self.caption_tokens, manifest)

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary of the captions' tokenizer; None without one. Raises ValueError as :meth:`manifest`."""
        manifest = self.manifest()
        return manifest.vocab_size if manifest.content["tokenizer"] else None

    def build(self, seed: int) -> DataSources:
        """Open the dataset; ``seed`` keys the order and what is random. ``validation`` is None when nothing was held
        out. Raises ValueError, DamagedDataError and FetchError, as the parts do."""
        from data_pipeline.source import DataSources

        manifest = self.manifest()
        train = self._source(manifest, "train", seed, self._transform())
        validation = None
        if "validation" in manifest.splits:
            still = dataclasses.replace(self._transform(), crop="center", flip=False)
            validation = self._source(manifest, "validation", seed, still)
        return DataSources(train=train, validation=validation, tokenizer_path=self._tokenizer_path(manifest))

    def _source(self, manifest: Manifest, split: str, seed: int, transform: ImageTransform) -> Any:
        from data_pipeline.media.build import media_source
        from data_pipeline.media.image_source import ImageSource

        options = {
            "transform": transform,
            "limits": self._limits(),
            "channels_first": self.channels_first,
            "caption_tokens": self.caption_tokens,
            "vocab_size": manifest.vocab_size if self.caption_tokens is not None else None,
        }
        return media_source(
            ImageSource,
            manifest,
            split,
            seed=seed,
            num_lanes=self.num_lanes,
            segment_bytes=self.segment_bytes,
            access=self._access(),
            row_key=[dataclasses.asdict(transform), self.caption_tokens],
            options=options,
        )

    def _transform(self) -> ImageTransform:
        from data_pipeline.media.decode import ImageTransform

        return ImageTransform(size=self.size, resize=self.resize, crop=self.crop, flip=self.flip)


@dataclass(frozen=True, kw_only=True)
class LatentDataConfig(_MediaFields):
    """Precomputed latents with their conditioning.

    ``conditioning_tokens`` is the length that token embeddings are padded or cut to (None: the longest of the
    dataset); ``caption_tokens`` that of captions (None leaves them out).
    """

    kinds: ClassVar[tuple[str, ...]] = ("latents",)

    conditioning_tokens: int | None = None
    caption_tokens: int | None = None

    def _manifest_violations(self, manifest: Manifest) -> Iterator[Violation]:
        yield from super()._manifest_violations(manifest)
        yield from _caption_violations(self.caption_tokens, manifest)
        if self.conditioning_tokens is not None and self.conditioning_tokens < 1:
            yield "conditioning_tokens", self.conditioning_tokens, "must be at least 1", "leave it out"

    def build(self, seed: int) -> DataSources:
        """Open the dataset; as :meth:`ImageDataConfig.build`."""
        from data_pipeline.source import DataSources

        manifest = self.manifest()
        train = self._source(manifest, "train", seed)
        validation = self._source(manifest, "validation", seed) if "validation" in manifest.splits else None
        return DataSources(train=train, validation=validation, tokenizer_path=self._tokenizer_path(manifest))

    def _source(self, manifest: Manifest, split: str, seed: int) -> Any:
        from data_pipeline.media.build import media_source
        from data_pipeline.media.latent_source import LatentLayout, LatentSource

        longest = manifest.content["latents"].get("longest_conditioning")
        tokens = self.conditioning_tokens or longest
        options = {
            "layout": LatentLayout.of(manifest.content),
            "conditioning_tokens": tokens,
            "caption_tokens": self.caption_tokens,
            "vocab_size": manifest.vocab_size if self.caption_tokens is not None else None,
        }
        return media_source(
            LatentSource,
            manifest,
            split,
            seed=seed,
            num_lanes=self.num_lanes,
            segment_bytes=self.segment_bytes,
            access=self._access(),
            row_key=[tokens, self.caption_tokens],
            options=options,
        )


@dataclass(frozen=True, kw_only=True)
class InterleavedDataConfig(_MediaFields):
    """Documents of text, images and speech, packed into rows of ``sequence_length`` positions; no span is cut.

    An image takes ``image_tokens`` positions and comes as ``image_size`` x ``image_size`` pixels; a second of speech
    takes ``speech_tokens_per_second`` and comes at ``speech_rate`` Hz. ``image_id`` and ``speech_id`` fill these
    positions; a start or end id that is not None puts a marker around each span. Ids may lie beyond the tokenizer's.

    Rows are packed within a segment. Where the recommended ones are too small to pack well, segments are enlarged and
    lanes reduced by the same factor, unless ``num_lanes`` or ``segment_bytes`` is given.
    """

    kinds: ClassVar[tuple[str, ...]] = ("interleaved",)

    sequence_length: int
    image_tokens: int = 256
    image_size: int = 256
    image_id: int
    image_start_id: int | None = None
    image_end_id: int | None = None
    speech_tokens_per_second: float = 25.0
    speech_rate: int = 16000
    speech_id: int
    speech_start_id: int | None = None
    speech_end_id: int | None = None

    def violations(self) -> Iterator[Violation]:
        """Broken rules as (field, found, rule, fix)."""
        for name in ("image_tokens", "image_size", "speech_tokens_per_second", "speech_rate"):
            if not getattr(self, name) > 0:
                yield name, getattr(self, name), "must be above 0", "set what the model's encoder gives"
        for name in _ID_FIELDS:
            value = getattr(self, name)
            if value is not None and value < 0:
                yield name, value, "must not be negative", "name a token id"
        if self.sequence_length < 2:
            yield "sequence_length", self.sequence_length, "must be at least 2", "set a length such as 4096"
        yield from super().violations()

    def _manifest_violations(self, manifest: Manifest) -> Iterator[Violation]:
        yield from super()._manifest_violations(manifest)
        facts = manifest.content.get("interleaved", {})
        longest: dict[str, list[Any]] = {"image_tokens": ["image", 0, 0]} if facts.get("images") else {}
        if "longest_speech" in facts:
            longest["speech_tokens_per_second"] = ["speech", *facts["longest_speech"]]
        for name, span in longest.items():
            if not getattr(self, name) > 0:
                continue
            width = self._layout().width(span)
            if width > self.sequence_length:
                what = "an image" if span[0] == "image" else f"the longest recording ({span[1] / span[2]:.1f} s)"
                rule = f"{what} takes {width} positions with its markers, but a row has {self.sequence_length}"
                yield name, getattr(self, name), rule, "lower it, or raise sequence_length: spans are never cut"

    @property
    def vocab_size(self) -> int:
        """Ids that the model must know: the tokenizer's, placeholders and markers. Raises as :meth:`manifest`."""
        ids = [getattr(self, name) for name in _ID_FIELDS]
        return max([self.manifest().vocab_size, *(value + 1 for value in ids if value is not None)])

    def build(self, seed: int) -> DataSources:
        """Open the dataset; as :meth:`ImageDataConfig.build`. Raises ValueError also for a span longer than a row."""
        from data_pipeline.source import DataSources

        manifest = self.manifest()
        faults = [f"{name} is {found}: {rule}" for name, found, rule, _ in self._manifest_violations(manifest)]
        if faults:
            raise ValueError("; ".join(faults))
        train = self._source(manifest, "train", seed)
        validation = self._source(manifest, "validation", seed) if "validation" in manifest.splits else None
        return DataSources(train=train, validation=validation, tokenizer_path=self._tokenizer_path(manifest))

    def _source(self, manifest: Manifest, split: str, seed: int) -> Any:
        from data_pipeline.media.build import SpanPlan, media_source
        from data_pipeline.media.decode import ImageTransform, Limits
        from data_pipeline.media.interleaved_source import InterleavedSource

        spans = SpanPlan(self._layout(), self.sequence_length)
        num_lanes, segment_bytes = self._lanes_and_segments(manifest)
        transform = ImageTransform(size=self.image_size)
        options = {
            "layout": spans.layout,
            "sequence_length": self.sequence_length,
            "transform": transform,
            "speech_rate": self.speech_rate,
            "limits": Limits(max_bytes=self.max_bytes, max_pixels=self.max_pixels),
            "vocab_size": manifest.vocab_size,
        }
        return media_source(
            InterleavedSource,
            manifest,
            split,
            seed=seed,
            num_lanes=num_lanes,
            segment_bytes=segment_bytes,
            access=self._access(),
            count_rows=spans.count_rows,
            plan_key=spans.key,
            row_key=[dataclasses.asdict(spans.layout), dataclasses.asdict(transform), self.speech_rate],
            options=options,
        )

    def _lanes_and_segments(self, manifest: Manifest) -> tuple[int | None, int | None]:
        if self.num_lanes is not None or self.segment_bytes is not None:
            return self.num_lanes, self.segment_bytes
        content, layout = manifest.content, self._layout()
        facts = content["interleaved"]
        positions = facts.get("text_tokens", 0) + facts.get("images", 0) * layout.width(["image", 0, 0])
        positions += facts.get("speech_milliseconds", 0) * self.speech_tokens_per_second / 1000
        lanes, size = int(content["num_lanes"]), int(content["segment_bytes"])
        total = sum(split["bytes"] for split in content["splits"].values())
        # The last row of a segment is half empty in the mean, so there should be many others.
        while lanes > _FEWEST_LANES and positions * size < _ROWS_WANTED * self.sequence_length * total:
            lanes, size = lanes // 2, size * 2
        return lanes, size

    def _layout(self) -> SpanLayout:
        from data_pipeline.media.packing import SpanLayout

        return SpanLayout(
            image_tokens=self.image_tokens,
            speech_tokens_per_second=self.speech_tokens_per_second,
            image_id=self.image_id,
            image_start_id=self.image_start_id,
            image_end_id=self.image_end_id,
            speech_id=self.speech_id,
            speech_start_id=self.speech_start_id,
            speech_end_id=self.speech_end_id,
        )


_ID_FIELDS = ("image_id", "image_start_id", "image_end_id", "speech_id", "speech_start_id", "speech_end_id")
