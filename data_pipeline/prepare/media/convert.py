"""Raw samples to samples of a dataset: checked, decoded once, tokenised. What cannot be used is rejected with a
reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_pipeline.media.arrays import array_bytes
from data_pipeline.media.audio import decode_speech, read_speech_header
from data_pipeline.media.captions import TEXT_MEMBER, TOKENS_MEMBER, caption_in
from data_pipeline.media.decode import DecodeError, TooLargeError, decode_image, read_image_header
from data_pipeline.media.latent_source import (
    CONDITIONING_MEMBER,
    LATENT_MEMBER,
    LatentLayout,
    parse_conditioning,
    parse_label,
    parse_latent,
)
from data_pipeline.prepare.encoding import HuggingFace
from data_pipeline.prepare.media.options import MediaOptions
from data_pipeline.prepare.media.readers import (
    CAPTION,
    CONDITIONING,
    IMAGE,
    LATENT,
    RECORD,
    RawSample,
    RejectError,
    read_file,
)
from data_pipeline.prepare.tokenizer import TokenizerFile

_MOST_SEGMENTS = 10_000


@dataclass
class Converted:
    """Members in the order in which they are stored; ``content`` stands for what the sample is (equal samples have
    equal content), ``facts`` are merged over the dataset by :func:`merge_facts`."""

    members: list[tuple[str, bytes]]
    attributes: dict[str, Any]
    content: bytes
    facts: dict[str, Any] = field(default_factory=dict)


class Converter(Protocol):
    """Makes a sample of a raw one; ``folder`` is where the paths in a document begin."""

    def __call__(self, raw: RawSample, folder: str) -> Converted: ...


class TextEncoder:
    """Text to framed token ids."""

    def __init__(self, file: TokenizerFile) -> None:
        self._file = file
        self._encode = HuggingFace(file)

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text without a frame."""
        if not texts:
            return []
        ids, lengths = self._encode([text.encode() for text in texts])
        return np.split(ids.astype(self._file.dtype), np.cumsum(lengths)[:-1])

    def frame(self, ids: np.ndarray) -> np.ndarray:
        """``bos + ids + eos``."""
        ends = np.array([self._file.bos_id, self._file.eos_id], dtype=self._file.dtype)
        return np.concatenate((ends[:1], ids, ends[1:]))


def make_converter(options: MediaOptions, tokenizer: TokenizerFile | None, layout: LatentLayout | None) -> Converter:
    """The converter of the kind of dataset."""
    encoder = None if tokenizer is None else TextEncoder(tokenizer)
    if options.kind == "images":
        return ImageConverter(options, encoder)
    if options.kind == "latents":
        return LatentConverter(options, encoder, layout)
    assert encoder is not None
    return DocumentConverter(options, encoder)


def merge_facts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Facts of two parts of a dataset joined: numbers add up, ``longest...`` ones take the larger."""
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif name == "longest_speech":  # [frames, rate]
            (frames, rate), (other_frames, other_rate) = merged[name], value
            if other_frames * rate > frames * other_rate:
                merged[name] = value
        else:
            merged[name] = max(merged[name], value) if name.startswith("longest") else merged[name] + value
    return merged


class _Captions:
    """Captions as members, according to the options."""

    def __init__(self, options: MediaOptions, encoder: TextEncoder | None) -> None:
        self._captions, self._encoder = options.captions, encoder

    def members(self, raw: RawSample) -> list[tuple[str, bytes]]:
        """``txt``, and ``tok.npy`` with a tokenizer. Raises RejectError."""
        if self._captions == "none":
            return []
        text = self._text(raw)
        if text is None:
            if self._captions == "required":
                raise RejectError("missing caption")
            text = ""
        found = [(TEXT_MEMBER, text.encode())]
        if self._encoder is not None:
            ids = self._encoder.frame(self._encoder.pieces([text])[0])
            found.append((TOKENS_MEMBER, array_bytes(ids)))
        return found

    @staticmethod
    def _text(raw: RawSample) -> str | None:
        if CAPTION in raw.parts:
            try:
                text = raw.parts[CAPTION].decode("utf-8", "strict").strip()
            except UnicodeDecodeError as error:
                raise RejectError("caption is not UTF-8", f"byte {error.start}") from None
            return text or None
        if RECORD in raw.parts:
            text = (caption_in(_json(raw.parts[RECORD])) or "").strip()
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RejectError("caption is not UTF-8", f"character {error.start}") from None
            return text or None
        return None


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RejectError("not JSON", str(error)) from None


def _checked_image(payload: bytes, options: MediaOptions) -> tuple[str, int, int]:
    """(extension, height, width) of an image that decodes to its end. Raises RejectError."""
    try:
        header = read_image_header(payload, options.limits)
    except DecodeError as error:
        raise RejectError(_reason(error, "undecodable image"), str(error)) from None
    if min(header.height, header.width) < options.min_side:
        raise RejectError("too small", f"{header.width} x {header.height} pixels, not {options.min_side}")
    try:
        decode_image(payload, options.limits, at_least=1, header=header)
    except DecodeError as error:
        raise RejectError("undecodable image", str(error)) from None
    return header.extension, header.height, header.width


def _reason(error: DecodeError, otherwise: str) -> str:
    return "too large" if isinstance(error, TooLargeError) else otherwise


class ImageConverter:
    """An image in its own format, its caption, and the JSON object beside it if there is one."""

    def __init__(self, options: MediaOptions, encoder: TextEncoder | None) -> None:
        self._options, self._captions = options, _Captions(options, encoder)

    def __call__(self, raw: RawSample, folder: str) -> Converted:
        if IMAGE not in raw.parts:
            raise RejectError("no image", f"it has {', '.join(sorted(raw.parts)) or 'nothing'}")
        payload = raw.parts[IMAGE]
        extension, height, width = _checked_image(payload, self._options)
        members = [(extension, payload), *self._captions.members(raw)]
        if RECORD in raw.parts:
            _json(raw.parts[RECORD])
            members.append((RECORD, raw.parts[RECORD]))
        return Converted(members, {"width": width, "height": height}, payload)


class LatentConverter:
    """A latent with what it is conditioned on: an array, a class label, a caption, as the first sample has them."""

    def __init__(self, options: MediaOptions, encoder: TextEncoder | None, layout: LatentLayout | None) -> None:
        self._captions, self._layout, self._shape = _Captions(options, encoder), layout, options.shape

    def __call__(self, raw: RawSample, folder: str) -> Converted:
        if LATENT not in raw.parts:
            raise RejectError("no latent", f"it has {', '.join(sorted(raw.parts)) or 'nothing'}")
        latent = self._latent(raw.parts[LATENT])
        members = [(LATENT_MEMBER, raw.parts[LATENT])]
        attributes: dict[str, Any] = {"shape": list(latent.shape)}
        facts: dict[str, Any] = {}
        if CONDITIONING in raw.parts and (self._layout is None or self._layout.conditioning_dims):
            conditioning = self._conditioning(raw.parts[CONDITIONING])
            members.append((CONDITIONING_MEMBER, raw.parts[CONDITIONING]))
            attributes["conditioning"] = list(conditioning.shape)
            facts["longest_conditioning"] = conditioning.shape[0] if conditioning.ndim == 2 else 1
        label = self._label(raw)
        if label is not None:
            members.append((RECORD, json.dumps({"label": label}).encode()))
            attributes["label"] = label
        captions = self._captions.members(raw) if self._wants_caption(raw) else []
        if self._layout is not None:
            self._complete(attributes, bool(captions))
        elif len(members) + len(captions) == 1:
            raise RejectError("no conditioning", "expected .cond.npy, a label or a caption in .json, or .txt")
        return Converted(members + captions, attributes, raw.parts[LATENT], facts)

    def describe(self, converted: Converted) -> dict[str, Any]:
        """The manifest's ``latents``, after the first sample."""
        shape = converted.attributes.get("conditioning")
        return {
            "shape": converted.attributes["shape"],
            "conditioning": None if shape is None else {"dims": len(shape), "width": shape[-1]},
            "label": "label" in converted.attributes,
            "caption": any(extension == TEXT_MEMBER for extension, _ in converted.members),
        }

    def _latent(self, payload: bytes) -> np.ndarray:
        expected = self._layout.shape if self._layout is not None else self._shape
        try:
            return parse_latent(payload, expected)
        except DecodeError as error:
            raise RejectError(_array_reason("latent", error), str(error)) from None

    def _conditioning(self, payload: bytes) -> np.ndarray:
        try:
            return parse_conditioning(payload, self._layout)
        except DecodeError as error:
            raise RejectError(_array_reason("conditioning", error), str(error)) from None

    def _label(self, raw: RawSample) -> int | None:
        if RECORD not in raw.parts or (self._layout is not None and not self._layout.has_label):
            return None
        record = _json(raw.parts[RECORD])
        if not isinstance(record, dict) or "label" not in record:
            return None
        try:
            return parse_label(raw.parts[RECORD])
        except DecodeError as error:
            raise RejectError("bad label", str(error)) from None

    def _wants_caption(self, raw: RawSample) -> bool:
        if self._layout is not None:
            return self._layout.has_caption
        return CAPTION in raw.parts or (RECORD in raw.parts and caption_in(_json(raw.parts[RECORD])) is not None)

    def _complete(self, attributes: dict[str, Any], has_caption: bool) -> None:
        assert self._layout is not None
        missing = [
            name
            for name, wanted, present in (
                ("array", self._layout.conditioning_dims, "conditioning" in attributes),
                ("label", self._layout.has_label, "label" in attributes),
                ("caption", self._layout.has_caption, has_caption),
            )
            if wanted and not present
        ]
        if missing:
            raise RejectError("no conditioning", f"no {' and no '.join(missing)}, which the first sample has")


def _array_reason(name: str, error: DecodeError) -> str:
    text = str(error)
    for mark, reason in (
        ("object array", "pickled array"),
        ("dtype", f"wrong {name} dtype"),
        ("shape", f"wrong {name} shape"),
        ("width", f"wrong {name} shape"),
        ("not finite", f"{name} is not finite"),
    ):
        if mark in text:
            return reason
    return f"undecodable {name}"


class DocumentConverter:
    """A document of text, images and speech: its text tokens joined, its media numbered by their place."""

    def __init__(self, options: MediaOptions, encoder: TextEncoder) -> None:
        self._options, self._encoder = options, encoder

    def __call__(self, raw: RawSample, folder: str) -> Converted:
        segments = parse_segments(raw.parts.get(RECORD))
        media: list[tuple[str, bytes]] = []
        spans: list[list[Any]] = []
        facts: dict[str, Any] = {}
        for place, segment in enumerate(segments):
            if segment["type"] == "text":
                spans.append(["text", 0])
                continue
            try:
                payload = self._payload(raw, segment, place, folder)
                extension, span = self._span(segment["type"], payload)
            except RejectError as error:
                raise RejectError(error.reason, f"segment {place}: {error.detail}") from None
            media.append((extension, payload))
            spans.append(span)
            if span[0] == "speech":
                milliseconds = -(-1000 * span[1] // span[2])
                found = {"speech": 1, "speech_milliseconds": milliseconds, "longest_speech": span[1:]}
                facts = merge_facts(facts, found)
            else:
                facts = merge_facts(facts, {"images": 1})
        segments, spans = _framed(segments, spans)
        texts = [segment["text"] for segment in segments if segment["type"] == "text"]
        pieces = self._encoder.pieces(texts)
        if not any(len(piece) for piece in pieces) and not media:
            raise RejectError("empty document")
        tokens = self._encoder.frame(np.concatenate(pieces))
        counts = [len(piece) for piece in pieces]
        counts[0] += 1
        counts[-1] += 1
        for span in spans:
            if span[0] == "text":
                span[1] = counts.pop(0)
        facts["text_tokens"] = len(tokens)
        stored = [{"type": s["type"], **({"text": s["text"]} if s["type"] == "text" else {})} for s in segments]
        record = json.dumps({"segments": stored}, ensure_ascii=False).encode()
        places = [place for place, segment in enumerate(segments) if segment["type"] != "text"]
        numbered = [
            (f"{place:03d}.{extension}", payload) for place, (extension, payload) in zip(places, media, strict=True)
        ]
        members = [(RECORD, record), (TOKENS_MEMBER, array_bytes(tokens)), *numbered]
        # Known before any medium is read, so that the tokenizer is trained on training documents alone.
        return Converted(members, {"spans": spans}, raw.parts[RECORD], facts)

    def _payload(self, raw: RawSample, segment: dict[str, Any], place: int, folder: str) -> bytes:
        if "path" in segment:
            if not isinstance(segment["path"], str):
                raise RejectError("bad segment", "its path is not a string")
            return read_file(folder, segment["path"], self._options.max_bytes)
        found = [payload for name, payload in raw.parts.items() if _number(name) == place]
        if len(found) != 1:
            raise RejectError("missing media", f"{len(found)} members are numbered {place:03d}, expected one")
        return found[0]

    def _span(self, kind: str, payload: bytes) -> tuple[str, list[Any]]:
        if kind == "image":
            extension, height, width = _checked_image(payload, self._options)
            return extension, ["image", height, width]
        try:
            header = read_speech_header(payload, self._options.limits)
            decode_speech(payload, self._options.limits)
        except DecodeError as error:
            raise RejectError(_reason(error, "undecodable speech"), str(error)) from None
        return header.extension, ["speech", header.frames, header.rate]


def _number(extension: str) -> int | None:
    head = extension.partition(".")[0]
    return int(head) if head.isascii() and head.isdigit() else None


def parse_segments(record: bytes | None) -> list[dict[str, Any]]:
    """The segments of a document. Raises RejectError unless they are a list of objects whose type is ``text`` (with
    a ``text``), ``image`` or ``speech``."""
    if record is None:
        raise RejectError("no document", "expected a .json with its segments")
    tree = _json(record)
    segments = tree.get("segments") if isinstance(tree, dict) else None
    if not isinstance(segments, list) or not segments or len(segments) > _MOST_SEGMENTS:
        raise RejectError("no segments", f"expected an object with a list of 1 to {_MOST_SEGMENTS} segments")
    for place, segment in enumerate(segments):
        kind = segment.get("type") if isinstance(segment, dict) else None
        if kind not in ("text", "image", "speech"):
            raise RejectError("bad segment", f"segment {place}: type {kind!r} is not text, image or speech")
        if kind == "text":
            try:
                if not isinstance(segment.get("text"), str):
                    raise RejectError("bad segment", f"segment {place}: its text is not a string")
                segment["text"].encode()
            except UnicodeEncodeError as error:
                raise RejectError("not UTF-8", f"segment {place}: character {error.start} of its text") from None
    return segments


def _framed(segments: list[dict[str, Any]], spans: list[list[Any]]) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """With empty text at either end where media stand there, for the first and last token of the document."""
    empty = {"type": "text", "text": ""}
    if segments[0]["type"] != "text":
        segments, spans = [empty, *segments], [["text", 0], *spans]
    if segments[-1]["type"] != "text":
        segments, spans = [*segments, empty], [*spans, ["text", 0]]
    return segments, spans
