"""Images from bytes to pixels: bounded before decoding, fast for JPEG, upright, RGB.

JPEG goes through libjpeg-turbo (``simplejpeg``), other formats and CMYK JPEG through PIL. What comes out is always
uint8 [H, W, 3]: grey is spread over three channels, transparency lies over white, 16-bit greys keep their upper
byte, and the EXIF orientation is applied, so that width and height are those a person sees. Of an animation the
first frame counts. The decoders release the GIL, so threads decode in parallel.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_PIL_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_ORIENTATION_TAG = 0x0112
_WHOLE_CIRCLE = 1 << 64
# Decoding to 3/4 or 7/8 of the size takes longer than decoding all of it.
_SMALLEST_DCT_FACTOR = 1.5
_MOST_SCRATCH_BYTES = 1 << 25


class DecodeError(ValueError):
    """Bytes that are not the medium they should be, are cut short, or are larger than allowed."""


class TooLargeError(DecodeError):
    """More bytes, pixels or seconds than the limits allow: nothing was decoded."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before any decoder sees it: files and pictures that would fill the memory."""

    max_bytes: int = 1 << 26
    max_pixels: int = 1 << 26
    max_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0")


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image say: ``height`` and ``width`` in pixels after ``orientation`` (EXIF, 1 to 8)
    is applied; ``turbo`` when libjpeg-turbo decodes it."""

    extension: str
    height: int
    width: int
    orientation: int
    turbo: bool


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """From any picture to uint8 [``size``, ``size``, 3]: the shorter side is resized to ``resize`` (default: ``size``)
    and a square is cropped, from the center or at random; ``flip`` mirrors every other one, at random.

    What is random comes from the key given with each picture, so the same sample looks the same on any rank.
    """

    size: int
    resize: int | None = None
    crop: str = "center"
    flip: bool = False

    @property
    def shorter_side(self) -> int:
        """Length of the shorter side before the crop, in pixels."""
        return self.resize or self.size

    def violations(self) -> list[tuple[str, object, str, str]]:
        """Broken rules as (field, found, rule, fix)."""
        found: list[tuple[str, object, str, str]] = []
        if self.size < 1:
            found.append(("size", self.size, "must be at least 1 pixel", "set a side length such as 256"))
        elif self.resize is not None and self.resize < self.size:
            found.append(("resize", self.resize, f"must be at least size ({self.size})", "raise it, or leave it out"))
        if self.crop not in ("center", "random"):
            found.append(("crop", self.crop, "must be center or random", "choose one of the two"))
        return found


def read_image_header(payload: bytes | memoryview, limits: Limits) -> ImageHeader:
    """Format and size of an image without decoding it.

    Raises DecodeError for another format or a broken header, TooLargeError for more than ``limits`` allow.
    """
    if len(payload) > limits.max_bytes:
        raise TooLargeError(f"{len(payload)} bytes, more than the {limits.max_bytes} allowed")
    extension = _sniff(bytes(payload[:16]))
    header = _turbo_header(payload) if extension == "jpg" else None
    if header is None:
        with _open(payload, extension) as image:
            width, height = image.size
            orientation = _orientation_of(image)
        turned = orientation >= 5
        header = ImageHeader(
            extension, width if turned else height, height if turned else width, orientation, turbo=False
        )
    if header.height * header.width > limits.max_pixels:
        found = f"{header.width} x {header.height}"
        raise TooLargeError(f"{found} pixels, more than the {limits.max_pixels} allowed in all")
    return header


def decode_image(
    payload: bytes | memoryview, limits: Limits, *, at_least: int | None = None, header: ImageHeader | None = None
) -> np.ndarray:
    """The picture as uint8 [H, W, 3]. With ``at_least`` a JPEG may come out smaller, to 1/8 up to 5/8 of its size
    in its DCT, as long as its shorter side keeps that many pixels.

    Raises DecodeError, also for a file that is cut short.
    """
    return _decode(payload, header or read_image_header(payload, limits), at_least, None)


def _decode(
    payload: bytes | memoryview, header: ImageHeader, at_least: int | None, scratch: _Scratch | None
) -> np.ndarray:
    """With ``scratch`` the result may lie in it."""
    if not header.turbo:
        return _decode_with_pil(payload, header)
    import simplejpeg

    size: dict[str, Any] = {}
    if at_least is not None and at_least < min(header.height, header.width):
        height, width = scaled_size(header.height, header.width, at_least)
        if header.orientation >= 5:
            height, width = width, height
        size = {"min_height": height, "min_width": width, "min_factor": _SMALLEST_DCT_FACTOR}
    try:
        buffer = None
        if scratch is not None:
            height, width = simplejpeg.decode_jpeg_header(payload, **size)[:2]
            buffer = scratch.take(0, height * width * 3)
        pixels = simplejpeg.decode_jpeg(payload, buffer=buffer, **size)
    except ValueError as error:
        raise DecodeError(f"JPEG cannot be decoded: {error}") from None
    return _upright(pixels, header.orientation)


class _Scratch(threading.local):
    """Memory of a thread for pictures on their way: fresh memory for each costs as much as decoding it."""

    def __init__(self) -> None:
        self._buffers = [np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)]

    def take(self, number: int, num_bytes: int) -> np.ndarray:
        """``num_bytes`` of buffer ``number``; of its own where that is too much to be kept."""
        if num_bytes > _MOST_SCRATCH_BYTES:
            return np.empty(num_bytes, dtype=np.uint8)
        if len(self._buffers[number]) < num_bytes:
            self._buffers[number] = np.empty(num_bytes, dtype=np.uint8)
        return self._buffers[number][:num_bytes]


_scratch = _Scratch()


def scaled_size(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side ``shorter_side`` and the proportions kept to the nearest pixel."""
    short = min(height, width)
    long = max(shorter_side, (2 * max(height, width) * shorter_side + short) // (2 * short))
    return (shorter_side, long) if height <= width else (long, shorter_side)


def transformed(
    payload: bytes | memoryview, transform: ImageTransform, limits: Limits, *key: object, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode, resize, crop and flip: uint8 [size, size, 3], in ``out`` when given. ``key`` decides what is random.

    A JPEG is first shrunk in its DCT as far as that goes. What is left is bilinear where it is little, else an average
    over areas (``cv2.INTER_AREA``); enlarging is bicubic. Raises DecodeError.
    """
    import cv2

    header = read_image_header(payload, limits)
    height, width = scaled_size(header.height, header.width, transform.shorter_side)
    if height * width > limits.max_pixels:
        raise TooLargeError(f"{header.width} x {header.height} pixels are too long and thin to be resized")
    pixels = _decode(payload, header, transform.shorter_side, _scratch)
    if pixels.shape[:2] != (height, width):
        shrinking = min(pixels.shape[:2]) / transform.shorter_side
        method = cv2.INTER_CUBIC if shrinking < 1 else cv2.INTER_LINEAR
        if shrinking >= _SMALLEST_DCT_FACTOR:
            method = cv2.INTER_AREA
        resized = _scratch.take(1, height * width * 3).reshape(height, width, 3)
        pixels = cv2.resize(pixels, (width, height), dst=resized, interpolation=method)
    rows, columns, side = height - transform.size, width - transform.size, transform.size
    top, left, mirrored = rows // 2, columns // 2, False
    if transform.crop == "random" or transform.flip:
        first, second, third = keyed_words(3, *key)
        if transform.crop == "random":
            top, left = _below(first, rows + 1), _below(second, columns + 1)
        mirrored = transform.flip and _below(third, 2) == 1
    pixels = pixels[top : top + side, left : left + side]
    out = np.empty((side, side, 3), dtype=np.uint8) if out is None else out
    out[...] = pixels[:, ::-1] if mirrored else pixels
    return out


def keyed_words(count: int, *key: object) -> tuple[int, ...]:
    """``count`` (at most 8) uniform 64-bit words that depend on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * count).digest()
    return struct.unpack(f"<{count}Q", digest)


def _below(word: int, bound: int) -> int:
    return word * bound // _WHOLE_CIRCLE


def _sniff(start: bytes) -> str:
    for signature, extension in _SIGNATURES.items():
        if start.startswith(signature):
            return extension
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    raise DecodeError(f"not a JPEG, PNG or WebP image (it begins with {start[:8]!r})")


def _turbo_header(payload: bytes | memoryview) -> ImageHeader | None:
    """Header of a JPEG that libjpeg-turbo decodes to RGB; None when PIL has to (CMYK)."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError as error:
        raise DecodeError(f"JPEG header cannot be read: {error}") from None
    if colorspace in ("CMYK", "YCCK"):
        return None
    orientation = jpeg_orientation(payload)
    if orientation >= 5:
        height, width = width, height
    return ImageHeader("jpg", height, width, orientation, turbo=True)


def jpeg_orientation(payload: bytes | memoryview) -> int:
    """EXIF orientation (1 to 8) of a JPEG, found by walking its marker segments; 1 when it has none."""
    at = 2
    while at + 4 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # picture data begin, or the end
            break
        length = payload[at + 2] << 8 | payload[at + 3]
        if marker == 0xE1 and bytes(payload[at + 4 : at + 10]) == b"Exif\0\0":
            return _tiff_orientation(bytes(payload[at + 10 : at + 2 + length]))
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    if first + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, first)
    for at in range(first + 2, min(first + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
        if (tag, kind, count) == (_ORIENTATION_TAG, 3, 1):
            return value if 1 <= value <= 8 else 1
    return 1


def _open(payload: bytes | memoryview, extension: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(payload), formats=(_PIL_NAMES[extension],))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DecodeError(f"{_PIL_NAMES[extension]} cannot be opened: {reason}") from None


def _orientation_of(image: Any) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block is no reason to refuse a sound picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_with_pil(payload: bytes | memoryview, header: ImageHeader) -> np.ndarray:
    from PIL import Image

    name = _PIL_NAMES[header.extension]
    try:
        with _open(payload, header.extension) as image:
            image.load()
            if image.mode.startswith("I;16"):
                deep, clear = np.asarray(image), image.info.get("transparency")
                grey = (deep >> 8).astype(np.uint8)
                if isinstance(clear, int):  # the one grey that is transparent, compared before it loses a byte
                    grey[deep == clear] = 255
                image = Image.fromarray(grey)
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            pixels = np.array(image.convert("RGB"))
    except DecodeError:
        raise
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError) as error:
        raise DecodeError(f"{name} cannot be decoded: {error}") from None
    return _upright(pixels, header.orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 1 as it is, 2 mirrored, 3 turned by 180 degrees, 4 mirrored top to bottom; 5, 6, 7
    and 8 the same as 1, 2, 3 and 4 reversed, after a transposition."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
