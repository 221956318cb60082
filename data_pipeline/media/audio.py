"""Speech from bytes to samples: FLAC and WAV through libsndfile, mono float32 at the rate asked for."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.media.decode import DecodeError, Limits, TooLargeError

SPEECH_EXTENSIONS = ("flac", "wav")
_SIGNATURES = {b"fLaC": "flac", b"RIFF": "wav"}
# Zero crossings of the sinc on either side, and the Kaiser window's shape: about 80 dB outside the band.
_ZERO_CROSSINGS, _KAISER_BETA, _ROLL_OFF = 32, 8.0, 0.95
_MAX_CHANNELS = 32


@dataclass(frozen=True)
class SpeechHeader:
    """``frames`` samples in each of ``channels`` at ``rate`` Hz."""

    extension: str
    frames: int
    rate: int
    channels: int


def read_speech_header(payload: bytes | memoryview, limits: Limits) -> SpeechHeader:
    """Format and length of a recording without decoding it.

    Raises DecodeError for another format or a broken header, TooLargeError for more than ``limits`` allow.
    """
    if len(payload) > limits.max_bytes:
        raise TooLargeError(f"{len(payload)} bytes, more than the {limits.max_bytes} allowed")
    extension = _SIGNATURES.get(bytes(payload[:4]))
    if extension is None or (extension == "wav" and bytes(payload[8:12]) != b"WAVE"):
        raise DecodeError(f"not a FLAC or WAV recording (it begins with {bytes(payload[:8])!r})")
    with _open(payload, extension) as sound:
        header = SpeechHeader(extension, sound.frames, sound.samplerate, sound.channels)
    if header.frames < 1:
        raise DecodeError("the recording is empty")
    if header.frames > limits.max_seconds * header.rate or header.channels > _MAX_CHANNELS:
        found = f"{header.frames / header.rate:.0f} s of {header.channels} channels"
        raise TooLargeError(f"{found}, more than the {limits.max_seconds:.0f} s and {_MAX_CHANNELS} channels allowed")
    return header


def decode_speech(payload: bytes | memoryview, limits: Limits, rate: int | None = None) -> np.ndarray:
    """The recording as float32 [frames] in [-1, 1], channels averaged, resampled to ``rate`` Hz when given.

    Raises DecodeError, also for a file that is cut short.
    """
    header = read_speech_header(payload, limits)
    with _open(payload, header.extension) as sound:
        try:
            samples = sound.read(dtype="float32", always_2d=True)
        except RuntimeError as error:  # the base of soundfile's errors
            raise DecodeError(f"{header.extension} cannot be decoded: {_reason(error)}") from None
    if len(samples) != header.frames or _declared_wav_bytes(payload, header.extension) > len(payload):
        raise DecodeError(f"{header.extension} is cut short: {len(samples)} of {header.frames} frames are there")
    mono = samples[:, 0] if header.channels == 1 else samples.mean(axis=1, dtype=np.float32)
    mono = np.ascontiguousarray(mono)
    return mono if rate is None or rate == header.rate else resample(mono, header.rate, rate)


def resampled_frames(frames: int, rate: int, new_rate: int) -> int:
    """Frames that :func:`resample` makes of ``frames``."""
    return -(-frames * new_rate // rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """float32 [frames] at ``rate`` to [ceil(frames * new_rate / rate)] at ``new_rate``, band-limited.

    Windowed-sinc interpolation (Smith, "Digital Audio Resampling Home Page", 2002) with one filter for each of the
    ``new_rate / gcd`` phases.
    """
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    filters = _filters(up, down)
    taps = filters.shape[1]
    before = taps // 2 - 1
    padded = np.concatenate((np.zeros(before, np.float32), samples, np.zeros(taps + down, np.float32)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
    out = np.empty(resampled_frames(len(samples), rate, new_rate), dtype=np.float32)
    for phase in range(min(up, len(out))):
        # Output n lies at input n * down / up; outputs of one phase are ``down`` inputs apart.
        first = phase * down // up
        count = len(range(phase, len(out), up))
        out[phase::up] = windows[first : first + count * down : down][:count] @ filters[phase * down % up]
    return out


@lru_cache(maxsize=16)
def _filters(up: int, down: int) -> np.ndarray:
    """Filter of each fractional position p / up, float32 [up, taps]; tap t lies at input ``t - (taps / 2 - 1)``."""
    cutoff = _ROLL_OFF * min(1.0, up / down)
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    distance = np.arange(up)[:, None] / up - (np.arange(2 * half)[None, :] - (half - 1))
    inside = np.clip(1.0 - (distance / half) ** 2, 0.0, None)
    window = np.i0(_KAISER_BETA * np.sqrt(inside)) / np.i0(_KAISER_BETA)
    filters = cutoff * np.sinc(cutoff * distance) * window
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def _declared_wav_bytes(payload: bytes | memoryview, extension: str) -> int:
    """Bytes that the chunks of a WAV file say they take; libsndfile trusts the file's length instead."""
    if extension != "wav":
        return 0
    at = 12
    while at + 8 <= len(payload):
        name, length = bytes(payload[at : at + 4]), int.from_bytes(payload[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
        if name == b"data":
            return at - length % 2
    return at


def _open(payload: bytes | memoryview, extension: str) -> Any:
    import soundfile

    try:
        return soundfile.SoundFile(io.BytesIO(payload), format=None)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DecodeError(f"{extension} cannot be opened: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What libsndfile says, without the object it says it about."""
    return str(error).rpartition(": ")[2]
