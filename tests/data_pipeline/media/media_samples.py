"""Small images, recordings and latents, and the folders, tars and tables that hold them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("a", "red", "green", "small", "round", "cat", "house", "on", "the", "hill", "größer", "東京")


def picture(number: int, height: int = 0, width: int = 0) -> np.ndarray:
    """A smooth colourful uint8 [H, W, 3] of its own size, unlike any other number's."""
    rng = np.random.default_rng(number)
    height, width = height or int(rng.integers(20, 60)), width or int(rng.integers(20, 60))
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, form: str = "JPEG", **options: Any) -> bytes:
    """``pixels`` in an image format."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def jpeg(number: int) -> bytes:
    """JPEG of :func:`picture`."""
    return encoded(picture(number), quality=90)


def caption(number: int) -> str:
    """A caption that names its number."""
    rng = np.random.default_rng(number)
    return f"{number}: " + " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9))))


def wave(number: int, rate: int = 8000) -> np.ndarray:
    """float32 [frames]: a tone of 0.1 to 0.4 s."""
    rng = np.random.default_rng(number)
    time = np.arange(int(rng.uniform(0.1, 0.4) * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * rng.uniform(200, 1500) * time)).astype(np.float32)


def recording(samples: np.ndarray, rate: int = 8000, form: str = "FLAC") -> bytes:
    """``samples`` as FLAC or WAV."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form)
    return stream.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    """``array`` as ``.npy``."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def latent(number: int, shape: tuple[int, ...] = (4, 6, 8)) -> np.ndarray:
    """float32 latent whose values bfloat16 holds exactly."""
    rng = np.random.default_rng(number)
    return (rng.integers(-64, 64, shape) / 16).astype(np.float32)


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values that need no more."""
    bits = array.astype("<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2")


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by relative name."""
    for name, payload in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """An archive as ``tar`` of the standard library makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def image_files(count: int) -> dict[str, bytes]:
    """Images with captions beside them."""
    files = {}
    for number in range(count):
        files[f"part{number % 3}/{number:04d}.jpg"] = jpeg(number)
        files[f"part{number % 3}/{number:04d}.txt"] = caption(number).encode()
    return files


def documents(count: int, folder: Path) -> Path:
    """A JSONL file of documents with their media beside it; every kind of order of segments occurs."""
    lines = []
    for number in range(count):
        rng = np.random.default_rng(1000 + number)
        segments: list[dict[str, str]] = []
        for place in range(int(rng.integers(1, 7))):
            kind = ("text", "image", "speech", "text")[int(rng.integers(0, 4))]
            name = f"media/{number:04d}_{place}"
            if kind == "text":
                text = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 60))))
                segments.append({"type": "text", "text": f"{number} {text}"})
            elif kind == "image":
                write_files(folder, {f"{name}.jpg": jpeg(10 * number + place)})
                segments.append({"type": "image", "path": f"{name}.jpg"})
            else:
                write_files(folder, {f"{name}.flac": recording(wave(10 * number + place))})
                segments.append({"type": "speech", "path": f"{name}.flac"})
        lines.append(json.dumps({"segments": segments}))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a dataset by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
