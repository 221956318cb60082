"""What a user may choose about a dataset of media."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.media.decode import Limits
from data_pipeline.prepare.tokenizer import TokenizerFile
from data_pipeline.store.manifest import digest_of

KINDS = ("images", "latents", "interleaved")
CAPTIONS = ("required", "optional", "none")


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """What decides a dataset of media besides the files.

    ``tokenizer`` is a ``tokenizer.json`` for captions or the text of documents; interleaved documents without one get
    a byte-level BPE with ``vocab_size`` ids, trained on their own text. ``captions``: samples without one are dropped
    (``required``), get an empty one (``optional``), or none is kept. ``segment_bytes`` None goes by the size of the
    set. ``shape`` [C, H, W] of latents None is that of the first one. Columns are those of Parquet files.
    """

    kind: str
    tokenizer: str | None = None
    vocab_size: int = 4096
    validation_fraction: float = 0.02
    shard_bytes: int = 1 << 28
    segment_bytes: int | None = None
    seed: int = 0
    captions: str = "required"
    min_side: int = 1
    max_pixels: int = Limits.max_pixels
    max_bytes: int = Limits.max_bytes
    max_seconds: float = Limits.max_seconds
    shape: tuple[int, ...] | None = None
    image_column: str = "image"
    latent_column: str = "latent"
    conditioning_column: str = "cond"
    label_column: str = "label"
    caption_column: str = "caption"

    def __post_init__(self) -> None:
        faults = []
        if self.kind not in KINDS:
            faults.append(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.captions not in CAPTIONS:
            faults.append(f"captions {self.captions!r} is not one of {', '.join(CAPTIONS)}")
        if not 0 <= self.validation_fraction < 1:
            faults.append(f"validation fraction {self.validation_fraction} must be at least 0 and below 1")
        for name in ("shard_bytes", "segment_bytes", "min_side", "max_pixels", "max_bytes", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                faults.append(f"{name.replace('_', ' ')} {value} must be above 0")
        if self.shape is not None and (len(self.shape) != 3 or min(self.shape) < 1):
            faults.append(f"shape {list(self.shape)} must be three sizes C, H, W above 0")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def limits(self) -> Limits:
        """What is refused before it is decoded."""
        return Limits(max_bytes=self.max_bytes, max_pixels=self.max_pixels, max_seconds=self.max_seconds)

    def choices(self, given: TokenizerFile | None) -> dict[str, Any]:
        """The options as JSON, a given tokenizer by the digest of its text."""
        tree = asdict(self)
        tree["shape"] = None if self.shape is None else list(self.shape)
        if given is not None:
            tree["tokenizer"] = digest_of(given.text)
        return tree
