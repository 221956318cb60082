"""Images with captions: batches of equal squares for diffusion models and autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_pipeline.fetch.storage import ByteRange
from data_pipeline.media.captions import TEXT_MEMBER, TOKENS_MEMBER, caption_of, pad_tokens, parse_tokens
from data_pipeline.media.decode import DecodeError, ImageTransform, Limits, transformed
from data_pipeline.media.media_source import MediaSource, RowRequest
from data_pipeline.order import Place
from data_pipeline.store.manifest import Sample

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class ImageRow:
    """``caption`` token ids, or None; the pixels are where they were decoded to."""

    caption: np.ndarray | None


class ImageSource(MediaSource[None, ImageRow]):
    """One row is one image: ``images`` uint8 [B, size, size, 3] (or [B, 3, size, size] with ``channels_first``).

    With ``caption_tokens`` T also ``caption_tokens`` int32 [B, T] and ``caption_mask`` bool [B, T], False on padding.
    """

    def __init__(
        self,
        *arguments: Any,
        transform: ImageTransform,
        limits: Limits,
        channels_first: bool = False,
        caption_tokens: int | None = None,
        vocab_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        import cv2

        cv2.setNumThreads(1)  # the threads of this source are the parallelism
        self._transform, self._limits, self._channels_first = transform, limits, channels_first
        self._caption_tokens, self._vocab_size = caption_tokens, vocab_size

    def captions(self, indices: Sequence[int]) -> list[str | None]:
        """The captions of global samples as text, None where a sample has none; damaged ones raise."""
        found = []
        for index in indices:
            request, _ = self._sound_request((index % self.num_lanes, index // self.num_lanes))
            sample = self._sample(request)
            read = partial(self._member, request, sample)
            try:
                found.append(caption_of(sample, read))
            except DecodeError as error:
                raise self._reader.damaged(sample, TEXT_MEMBER, str(error)) from None
        return found

    def _member(self, request: RowRequest[None], sample: Sample, extension: str) -> memoryview:
        return self._members(request, sample, [extension])[extension]

    def _prepare(self, samples: list[Sample], payload: tuple[ByteRange, bytes] | None, place: Place) -> None:
        return None

    def _load(self, request: RowRequest[None], slot: np.ndarray | None) -> ImageRow:
        sample = self._sample(request)
        image = next((extension for extension in IMAGE_MEMBERS if extension in sample.members), IMAGE_MEMBERS[0])
        wanted = [image] if self._caption_tokens is None else [image, TOKENS_MEMBER]
        members = self._members(request, sample, wanted)
        caption = None
        if self._caption_tokens is not None:
            assert self._vocab_size is not None
            ids, size = members[TOKENS_MEMBER], self._vocab_size
            caption = self._decoded(sample, TOKENS_MEMBER, lambda: parse_tokens(ids, size))
        transform = partial(
            transformed, members[image], self._transform, self._limits, *request.draw_key, out=self._channels_last(slot)
        )
        self._decoded(sample, image, transform)
        return ImageRow(caption)

    def _allocate(self, count: int) -> np.ndarray:
        size = self._transform.size
        shape = (count, 3, size, size) if self._channels_first else (count, size, size, 3)
        return np.empty(shape, dtype=np.uint8)

    def _channels_last(self, slot: np.ndarray | None) -> np.ndarray | None:
        return slot.transpose(1, 2, 0) if slot is not None and self._channels_first else slot

    def _collate(self, rows: list[ImageRow], allocated: np.ndarray | None) -> dict[str, np.ndarray]:
        assert allocated is not None
        arrays = {"images": allocated}
        if self._caption_tokens is not None:
            captions = [row.caption for row in rows if row.caption is not None]
            arrays["caption_tokens"], arrays["caption_mask"] = pad_tokens(captions, self._caption_tokens)
        return arrays

    def _blank(self, row: ImageRow) -> ImageRow:
        return ImageRow(None if row.caption is None else row.caption[:0])

    def _origins(self, request: RowRequest[None]) -> list[dict[str, Any]]:
        sample = self._sample(request)
        return [{"shard": sample.shard, "key": sample.key, **_named(sample)}]

    @staticmethod
    def _sample(request: RowRequest[None]) -> Sample:
        return request.segment.samples[request.row]


def _named(sample: Sample) -> dict[str, Any]:
    return {"source": sample.attributes["source"]} if "source" in sample.attributes else {}
