"""Precomputed latents with their conditioning, for training without an autoencoder in the loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.fetch.storage import ByteRange
from data_pipeline.media.arrays import CONDITIONING_DTYPES, LATENT_DTYPES, as_float, parse_array
from data_pipeline.media.captions import JSON_MEMBER, TOKENS_MEMBER, pad_tokens, parse_tokens
from data_pipeline.media.decode import DecodeError
from data_pipeline.media.media_source import MediaSource, RowRequest
from data_pipeline.order import Place
from data_pipeline.store.manifest import Sample

LATENT_MEMBER, CONDITIONING_MEMBER = "lat.npy", "cond.npy"


@dataclass(frozen=True)
class LatentRow:
    """``latent`` [C, H, W]; ``conditioning`` [D] or [T, D], ``label``, ``caption`` token ids where the set has them."""

    latent: np.ndarray
    conditioning: np.ndarray | None
    label: int | None
    caption: np.ndarray | None


@dataclass(frozen=True)
class LatentLayout:
    """What every sample of a set holds, as its manifest says: ``shape`` [C, H, W] of latents, number of dimensions
    of the conditioning (0 for none) and its width, whether there is a class label and a caption."""

    shape: tuple[int, ...]
    conditioning_dims: int
    conditioning_width: int
    has_label: bool
    has_caption: bool = False

    @classmethod
    def of(cls, content: dict[str, Any]) -> LatentLayout:
        """From the manifest's content."""
        latents = content["latents"]
        conditioning = latents["conditioning"]
        return cls(
            tuple(latents["shape"]),
            conditioning["dims"] if conditioning else 0,
            conditioning["width"] if conditioning else 0,
            bool(latents["label"]),
            bool(latents["caption"]),
        )


class LatentSource(MediaSource[None, LatentRow]):
    """One row is one latent: ``latents`` [B, C, H, W], float16 or float32 (bfloat16 comes as float32 of equal value).

    As far as the set has them: ``conditioning`` [B, D], or [B, T, D] with ``conditioning_mask`` bool [B, T] where T is
    ``conditioning_tokens``; ``labels`` int64 [B]; ``caption_tokens`` int32 [B, K] with ``caption_mask``.
    """

    def __init__(
        self,
        *arguments: Any,
        layout: LatentLayout,
        conditioning_tokens: int | None = None,
        caption_tokens: int | None = None,
        vocab_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._layout = layout
        self._conditioning_tokens = conditioning_tokens
        self._caption_tokens, self._vocab_size = caption_tokens, vocab_size
        self._wanted = [LATENT_MEMBER]
        self._wanted += [CONDITIONING_MEMBER] if layout.conditioning_dims else []
        self._wanted += [JSON_MEMBER] if layout.has_label else []
        self._wanted += [TOKENS_MEMBER] if caption_tokens is not None else []

    def _prepare(self, samples: list[Sample], payload: tuple[ByteRange, bytes] | None, place: Place) -> None:
        return None

    def _load(self, request: RowRequest[None], slot: np.ndarray | None) -> LatentRow:
        sample = request.segment.samples[request.row]
        members = self._members(request, sample, self._wanted)
        layout = self._layout
        latent = self._decoded(sample, LATENT_MEMBER, lambda: parse_latent(members[LATENT_MEMBER], layout.shape))
        conditioning = label = caption = None
        if layout.conditioning_dims:
            conditioning = self._decoded(
                sample, CONDITIONING_MEMBER, lambda: parse_conditioning(members[CONDITIONING_MEMBER], layout)
            )
        if layout.has_label:
            label = int(self._decoded(sample, JSON_MEMBER, lambda: np.array(parse_label(members[JSON_MEMBER]))))
        if self._caption_tokens is not None:
            size = self._vocab_size or 0
            caption = self._decoded(sample, TOKENS_MEMBER, lambda: parse_tokens(members[TOKENS_MEMBER], size))
        return LatentRow(latent, conditioning, label, caption)

    def _collate(self, rows: list[LatentRow], allocated: np.ndarray | None) -> dict[str, np.ndarray]:
        arrays = {"latents": np.stack([row.latent for row in rows])}
        conditioning = [row.conditioning for row in rows if row.conditioning is not None]
        if self._layout.conditioning_dims == 1:
            arrays["conditioning"] = np.stack(conditioning)
        elif self._layout.conditioning_dims == 2:
            length = self._conditioning_tokens or 1
            padded = np.zeros((len(rows), length, self._layout.conditioning_width), dtype=conditioning[0].dtype)
            mask = np.zeros((len(rows), length), dtype=bool)
            for number, tokens in enumerate(conditioning):
                padded[number, : len(tokens)] = tokens[:length]
                mask[number, : len(tokens)] = True
            arrays["conditioning"], arrays["conditioning_mask"] = padded, mask
        if self._layout.has_label:
            arrays["labels"] = np.array([row.label for row in rows], dtype=np.int64)
        if self._caption_tokens is not None:
            captions = [row.caption for row in rows if row.caption is not None]
            arrays["caption_tokens"], arrays["caption_mask"] = pad_tokens(captions, self._caption_tokens)
        return arrays

    def _blank(self, row: LatentRow) -> LatentRow:
        conditioning = row.conditioning
        if conditioning is not None:
            conditioning = conditioning[:0] if conditioning.ndim == 2 else np.zeros_like(conditioning)
        caption = None if row.caption is None else row.caption[:0]
        return LatentRow(np.zeros_like(row.latent), conditioning, None if row.label is None else 0, caption)

    def _origins(self, request: RowRequest[None]) -> list[dict[str, Any]]:
        sample = request.segment.samples[request.row]
        source = {"source": sample.attributes["source"]} if "source" in sample.attributes else {}
        return [{"shard": sample.shard, "key": sample.key, **source}]


def parse_latent(payload: bytes | memoryview, shape: tuple[int, ...] | None) -> np.ndarray:
    """A latent [C, H, W] as float16 or float32. Raises DecodeError for another shape or dtype, or values that are not
    finite."""
    latent = as_float(parse_array(payload, LATENT_DTYPES, (3,)))
    if shape is not None and latent.shape != shape:
        raise DecodeError(f"latent shape {list(latent.shape)}, expected {list(shape)}")
    return _finite(latent, "latent")


def parse_conditioning(payload: bytes | memoryview, layout: LatentLayout | None) -> np.ndarray:
    """A conditioning vector [D] or token embeddings [T, D] as float16 or float32; raises as :func:`parse_latent`."""
    dims = (1, 2) if layout is None else (layout.conditioning_dims,)
    conditioning = as_float(parse_array(payload, CONDITIONING_DTYPES, dims))
    if layout is not None and conditioning.shape[-1] != layout.conditioning_width:
        raise DecodeError(f"conditioning of width {conditioning.shape[-1]}, expected {layout.conditioning_width}")
    return _finite(conditioning, "conditioning")


def parse_label(payload: bytes | memoryview) -> int:
    """``label`` of a JSON object. Raises DecodeError when it is not a whole number from 0 on."""
    try:
        record = json.loads(bytes(payload))
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from None
    label = record.get("label") if isinstance(record, dict) else None
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 1 << 63:
        raise DecodeError(f"label is {label!r}, expected a whole number from 0 on")
    return label


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise DecodeError(f"{name} holds values that are not finite (NaN or infinity)")
    return array
