"""What the members of a sample must hold, by their extension, checked without decoding pictures or sound."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.media.arrays import TOKEN_DTYPES, parse_array
from data_pipeline.media.audio import read_speech_header
from data_pipeline.media.decode import DecodeError, Limits, read_image_header
from data_pipeline.media.latent_source import LatentLayout, parse_conditioning, parse_label, parse_latent

Members = Mapping[str, bytes | memoryview]
Fault = tuple[str, str]
"""Extension and what is wrong with that member."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Sizes are stated, not judged, here: what a run accepts is its own configuration.
_NO_LIMITS = Limits(max_bytes=1 << 62, max_pixels=1 << 62, max_seconds=float("inf"))
_NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1")
_NUMBER_DTYPES = tuple(f"{order}{number}" for order in "<|" for number in _NUMBERS)


def attributes_of(kind: str, members: Members) -> tuple[dict[str, Any], list[Fault]]:
    """Attributes of a sample of ``kind`` from its members' headers, and every fault found on the way.

    ``images`` gives ``width`` and ``height``, ``latents`` gives ``shape``, ``conditioning`` (shape) and ``label``, as
    far as it has them; other kinds give nothing.
    """
    named = ", ".join(sorted(members))
    if kind == "images":
        images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
        if len(images) != 1:
            return {}, [(min(members), f"the sample has {len(images)} images, expected one (it has {named})")]
        try:
            header = read_image_header(members[images[0]], _NO_LIMITS)
        except DecodeError as error:
            return {}, [(images[0], str(error))]
        return {"width": header.width, "height": header.height}, []
    if kind == "latents":
        if "lat.npy" not in members:
            return {}, [(min(members), f"the sample has no lat.npy (it has {named})")]
        return _latent_attributes(members)
    return {}, []


def _latent_attributes(members: Members) -> tuple[dict[str, Any], list[Fault]]:
    attributes: dict[str, Any] = {}
    extension = "lat.npy"
    try:
        attributes["shape"] = list(parse_latent(members[extension], None).shape)
        if "cond.npy" in members:
            extension = "cond.npy"
            attributes["conditioning"] = list(parse_conditioning(members[extension], None).shape)
        if "json" in members:
            extension = "json"
            record = _json_object(members[extension])
            if isinstance(record, dict) and "label" in record:
                attributes["label"] = parse_label(members[extension])
    except DecodeError as error:
        return attributes, [(extension, str(error))]
    return attributes, []


def latent_layout(members: Members, attributes: Mapping[str, Any]) -> LatentLayout:
    """The layout of one sample of latents from its :func:`attributes_of`."""
    conditioning = attributes.get("conditioning", [])
    return LatentLayout(
        shape=tuple(attributes["shape"]),
        conditioning_dims=len(conditioning),
        conditioning_width=conditioning[-1] if conditioning else 0,
        has_label="label" in attributes,
        has_caption="txt" in members,
    )


def content_faults(content: dict[str, Any], members: Members, attributes: Mapping[str, Any]) -> Iterator[Fault]:
    """Every member that does not hold what its extension, the sample's ``attributes`` or the manifest's ``content``
    say."""
    kind, tokenizer = content["kind"], content.get("tokenizer")
    vocab_size = None if tokenizer is None else int(tokenizer["vocab_size"])
    layout = LatentLayout.of(content) if "latents" in content else None
    for extension, payload in members.items():
        try:
            problem = _member_problem(extension, payload, vocab_size, layout)
        except DecodeError as error:
            problem = str(error)
        if problem:
            yield extension, problem
    if attributes and kind in ("images", "latents"):
        found, faults = attributes_of(kind, members)
        yield from faults
        wrong = [name for name, value in found.items() if attributes.get(name) != value]
        if wrong:
            said = ", ".join(f"{name} {attributes.get(name)}" for name in wrong)
            yield min(members), f"the sidecar says {said}; the members have {found}"
    if "spans" in attributes:
        yield from _span_faults(members, attributes["spans"])


def _member_problem(
    extension: str, payload: bytes | memoryview, vocab_size: int | None, layout: LatentLayout | None
) -> str | None:
    if extension == "txt":
        try:
            bytes(payload).decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            return f"not UTF-8: byte {error.start} ({error.reason})"
    elif extension == "json":
        _json_object(payload)
        if layout is not None and layout.has_label:
            parse_label(payload)
    elif extension == "tok.npy":
        ids = parse_array(payload, TOKEN_DTYPES, (1,))
        if vocab_size is not None and int(ids.max()) >= vocab_size:
            return f"token id {int(ids.max())} is outside the vocabulary of {vocab_size}"
    elif extension == "lat.npy" and layout is not None:
        parse_latent(payload, layout.shape)
    elif extension == "cond.npy" and layout is not None:
        parse_conditioning(payload, layout)
    elif extension == "npy" or extension.endswith(".npy"):
        parse_array(payload, _NUMBER_DTYPES, tuple(range(9)))
    return None


def _json_object(payload: bytes | memoryview) -> Any:
    try:
        return json.loads(bytes(payload))
    except ValueError as error:
        raise DecodeError(f"not JSON ({error})") from None


def _span_faults(members: Members, spans: list[list[Any]]) -> Iterator[Fault]:
    """The text's tokens, and each picture and recording by its place, against the sidecar's spans."""
    said_tokens = sum(int(span[1]) for span in spans if span[0] == "text")
    try:
        tokens = len(parse_array(members["tok.npy"], TOKEN_DTYPES, (1,))) if "tok.npy" in members else 0
        if tokens != said_tokens:
            yield min(members), f"{tokens} tokens of text, the sidecar says {said_tokens}"
    except DecodeError:
        pass  # told as the member's own fault
    places = {int(head): name for name in members if (head := name.partition(".")[0]).isdigit()}
    for place in sorted(places.keys() - {at for at, span in enumerate(spans) if span[0] != "text"}):
        yield places[place], "the sidecar has no such image or recording"
    for place, span in enumerate(spans):
        if span[0] == "text":
            continue
        if place not in places:
            yield min(members), f"{span[0]} number {place} is not there"
            continue
        payload = members[places[place]]
        try:
            if span[0] == "image":
                image = read_image_header(payload, _NO_LIMITS)
                found: list[Any] = ["image", image.height, image.width]
            else:
                speech = read_speech_header(payload, _NO_LIMITS)
                found = ["speech", speech.frames, speech.rate]
        except DecodeError as error:
            yield places[place], str(error)
            continue
        if found != list(span):
            yield places[place], f"found {found}, the sidecar says {list(span)}"
