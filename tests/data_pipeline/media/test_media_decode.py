"""What comes out of the decoders, against PIL, soundfile and arithmetic; and what they refuse."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from media_samples import bfloat16_bits, encoded, jpeg, latent, npy, picture, recording, wave
from PIL import Image, ImageOps

from data_pipeline.media.arrays import as_float, parse_array
from data_pipeline.media.audio import decode_speech, read_speech_header, resample
from data_pipeline.media.decode import (
    DecodeError,
    ImageTransform,
    Limits,
    decode_image,
    read_image_header,
    scaled_size,
    transformed,
)

LIMITS = Limits()
SCENE = picture(7, 300, 420)


def pil(payload: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB"))


@pytest.mark.parametrize(
    "payload",
    [
        encoded(SCENE, quality=85),
        encoded(SCENE, quality=95, subsampling=0),
        encoded(SCENE, progressive=True),
        encoded(SCENE[:, :, 0]),
        encoded(SCENE, "PNG"),
        encoded(SCENE[:, :, 1], "PNG"),
        encoded(SCENE, "WEBP", quality=80),
    ],
    ids=["jpeg", "jpeg444", "progressive", "grey", "png", "grey_png", "webp"],
)
def test_full_decode_is_that_of_pil_to_the_bit(payload: bytes) -> None:
    np.testing.assert_array_equal(decode_image(payload, LIMITS), pil(payload))


def test_cmyk_jpeg_takes_the_slow_way_and_agrees() -> None:
    stream = io.BytesIO()
    Image.fromarray(SCENE).convert("CMYK").save(stream, "JPEG")
    assert not read_image_header(stream.getvalue(), LIMITS).turbo
    np.testing.assert_array_equal(decode_image(stream.getvalue(), LIMITS), pil(stream.getvalue()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(SCENE, form, exif=exif)
    pixels = decode_image(payload, LIMITS)
    np.testing.assert_array_equal(pixels, pil(payload))
    header = read_image_header(payload, LIMITS)
    assert (header.height, header.width) == pixels.shape[:2]
    small = transformed(payload, ImageTransform(size=32), LIMITS)
    reference = Image.fromarray(pixels).resize(scaled_size(*pixels.shape[:2], 32)[::-1], Image.Resampling.BOX)
    assert np.abs(small.astype(int) - _center(np.asarray(reference), 32)).mean() < 5


def test_broken_exif_is_no_reason_to_refuse() -> None:
    exif = b"\xff\xe1" + struct.pack(">H", 12) + b"Exif\0\0II*\0"
    payload = encoded(SCENE)
    pixels = decode_image(payload[:2] + exif + payload[2:], LIMITS)
    np.testing.assert_array_equal(pixels, pil(payload))


def test_transparency_lies_over_white_and_16_bit_grey_keeps_its_upper_byte() -> None:
    clear = np.dstack((SCENE, np.zeros(SCENE.shape[:2], np.uint8)))
    assert (decode_image(encoded(clear, "PNG"), LIMITS) == 255).all()
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    np.testing.assert_array_equal(decode_image(encoded(deep, "PNG"), LIMITS)[:, :, 2], deep >> 8)


def _center(pixels: np.ndarray, side: int) -> np.ndarray:
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side].astype(int)


@pytest.mark.parametrize("size", [17, 48, 100, 256, 400])
def test_resize_and_crop_agree_with_pil(size: int) -> None:
    payload = encoded(SCENE, quality=92)
    ours = transformed(payload, ImageTransform(size=size), LIMITS)
    method = Image.Resampling.BOX if size < 300 else Image.Resampling.BICUBIC
    width_height = scaled_size(300, 420, size)[::-1]
    reference = _center(np.asarray(Image.fromarray(pil(payload)).resize(width_height, method)), size)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours.astype(int) - reference).mean() < 5
    shifted = np.roll(reference, 3, axis=1)
    assert np.abs(ours.astype(int) - shifted).mean() > 2 * np.abs(ours.astype(int) - reference).mean()


def test_random_crop_and_flip_come_from_the_key_alone() -> None:
    payload, transform = encoded(SCENE), ImageTransform(size=32, resize=64, crop="random", flip=True)
    draws = [transformed(payload, transform, LIMITS, "run", index) for index in range(40)]
    again = [transformed(payload, transform, LIMITS, "run", index) for index in range(40)]
    assert all((a == b).all() for a, b in zip(draws, again, strict=True))
    assert len({draw.tobytes() for draw in draws}) > 35
    whole = transformed(payload, ImageTransform(size=64, resize=64), LIMITS)
    assert whole.shape == (64, 64, 3)
    mirrored = ImageTransform(size=64, resize=64, flip=True)
    flips = [transformed(payload, mirrored, LIMITS, index) for index in range(60)]
    ways = [int((flip == whole[:, ::-1]).all()) for flip in flips]
    assert all((flip == (whole[:, ::-1] if way else whole)).all() for flip, way in zip(flips, ways, strict=True))
    assert 15 < sum(ways) < 45


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.9, 0.999])
def test_truncated_images_are_errors(form: str, share: float) -> None:
    payload = encoded(SCENE, form)
    with pytest.raises(DecodeError):
        decode_image(payload[: int(len(payload) * share)], LIMITS)


@pytest.mark.parametrize("payload", [b"", b"\xff\xd8\xff", b"GIF89a" + bytes(50), b"<svg/>", bytes(100)])
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        read_image_header(payload, LIMITS)


def _png_bomb(side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 50_000])
def test_bombs_are_refused_from_the_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DecodeError):
        read_image_header(_png_bomb(side), LIMITS)
    import simplejpeg

    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DecodeError, match="420 x 300 pixels, more than the 1000"):
        decode_image(encoded(SCENE), Limits(max_pixels=1000))
    with pytest.raises(DecodeError, match="bytes, more than the 100 allowed"):
        decode_image(encoded(SCENE), Limits(max_bytes=100))


@pytest.mark.parametrize("form", ["FLAC", "WAV"])
def test_speech_is_that_of_soundfile(form: str) -> None:
    stereo = np.stack((wave(1)[:700], wave(2)[:700]), axis=1)
    payload = recording(stereo, 8000, form)
    reference, rate = soundfile.read(io.BytesIO(payload), dtype="float32")
    assert rate == 8000
    np.testing.assert_allclose(decode_speech(payload, LIMITS), reference.mean(axis=1), atol=1e-7)
    header = read_speech_header(payload, LIMITS)
    assert (header.extension, header.frames, header.rate, header.channels) == (form.lower(), 700, 8000, 2)


@pytest.mark.parametrize(("rate", "new_rate"), [(44100, 16000), (8000, 16000), (48000, 24000), (22050, 16000)])
def test_resampling_keeps_a_tone_and_drops_what_the_new_rate_cannot_hold(rate: int, new_rate: int) -> None:
    def tone(hertz: float, at: int) -> np.ndarray:
        return (0.5 * np.sin(2 * np.pi * hertz * np.arange(at // 2) / at)).astype(np.float32)

    inside = slice(200, -200)
    low = resample(tone(440, rate), rate, new_rate)
    assert len(low) == -(-(rate // 2) * new_rate // rate)
    np.testing.assert_allclose(low[inside], tone(440, new_rate)[: len(low)][inside], atol=2e-4)
    if new_rate < rate:
        high = resample(tone(0.49 * rate, rate), rate, new_rate)
        assert np.abs(high[inside]).max() < 1e-3


@pytest.mark.parametrize("form", ["FLAC", "WAV"])
@pytest.mark.parametrize("missing", [1, 200])
def test_truncated_speech_is_an_error(form: str, missing: int) -> None:
    payload = recording(wave(3), 8000, form)
    with pytest.raises(DecodeError):
        decode_speech(payload[:-missing], LIMITS)


def test_long_or_empty_or_other_sound_is_refused() -> None:
    with pytest.raises(DecodeError, match="more than the 0 s"):
        read_speech_header(recording(wave(3)), Limits(max_seconds=0.05))
    with pytest.raises(DecodeError, match="empty"):
        read_speech_header(recording(np.zeros(0, np.float32), form="WAV"), LIMITS)
    with pytest.raises(DecodeError, match="not a FLAC or WAV"):
        read_speech_header(jpeg(0), LIMITS)


def test_arrays_come_back_and_bfloat16_is_exact() -> None:
    values = latent(4)
    for array, dtypes in ((values, ("<f4",)), (values.astype(np.float16), ("<f2",))):
        np.testing.assert_array_equal(parse_array(npy(array), dtypes, (3,)), array)
    np.testing.assert_array_equal(as_float(parse_array(npy(bfloat16_bits(values)), ("<u2",), (3,))), values)


class _Spy:
    """Unpickling it leaves a mark."""

    opened = False

    def __reduce__(self) -> tuple[object, tuple[str, str, bool]]:
        return setattr, (_Spy, "opened", True)


def test_pickles_are_never_opened() -> None:
    payload = npy(np.array([_Spy()], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="object array"):
        parse_array(payload, ("<f4",), (1,))
    assert not _Spy.opened


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy(latent(0).astype(">f4")), "dtype '>f4'"),
        (npy(latent(0).astype("<f8")), "dtype '<f8'"),
        (npy(latent(0)[0]), "shape"),
        (npy(latent(0)[:0]), "shape"),
        (npy(np.asfortranarray(latent(0))), "Fortran"),
        (npy(latent(0))[:-1], "its header says"),
        (npy(latent(0)) + b"x", "its header says"),
        (b"\x93NUMPY\x03\x00" + bytes(60), "version"),
        (b"nothing", "not an .npy file"),
    ],
)
def test_arrays_that_are_not_what_they_should_be(payload: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        parse_array(payload, ("<f4", "<f2"), (3,))


def test_the_transparent_grey_of_a_16_bit_png_is_white() -> None:
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    clear = int(deep[20, 30])  # other greys share its upper byte, and stay
    expected = np.where(deep == clear, 255, deep >> 8)
    for channel in range(3):
        pixels = decode_image(encoded(deep, "PNG", transparency=clear), LIMITS)
        np.testing.assert_array_equal(pixels[:, :, channel], expected)
