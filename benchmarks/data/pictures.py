"""Pictures with captions for the image benchmark: cut from the sample photographs of installed packages.

Deterministic: each picture is a crop of one photograph, rotated, recoloured, with film grain, saved as JPEG of quality
90 with 0.37 megapixels in the mean. Without such photographs smooth noise takes their place.
"""

from __future__ import annotations

import importlib.util
import io
import math
import tarfile
from pathlib import Path

import numpy as np

MEAN_PIXELS = 0.37e6
_SPREAD = 0.4
_ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
_PER_SHARD = 250
_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/coffee.png"),
)
_WORDS = ("a", "photograph", "of", "the", "old", "quiet", "small", "bright", "temple", "flower", "garden", "officer")


def write_shards(folder: Path, count: int) -> None:
    """``count`` pictures as plain WebDataset tars (``KEY.jpg``, ``KEY.txt``) in ``folder``."""
    import cv2

    folder.mkdir(parents=True)
    photographs = _photographs()
    for shard in range(-(-count // _PER_SHARD)):
        with tarfile.open(folder / f"pictures-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * _PER_SHARD, min(count, (shard + 1) * _PER_SHARD)):
                generator = np.random.default_rng(number)
                pixels = _picture(photographs[number % len(photographs)], generator)
                done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
                assert done
                words = generator.choice(_WORDS, size=int(generator.integers(8, 40)))
                _add(archive, f"{number:08d}.jpg", encoded.tobytes())
                _add(archive, f"{number:08d}.txt", " ".join(words).encode())


def _photographs() -> list[np.ndarray]:
    import cv2

    found: list[np.ndarray] = []
    for package, name in _PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        path = Path(spec.submodule_search_locations[0]) / name if spec and spec.submodule_search_locations else None
        if path is not None and path.exists():
            found.append(np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR)))
    if not found:
        noise = np.random.default_rng(0).normal(128, 60, (480, 640, 3)).astype(np.float32)
        found = [np.clip(cv2.GaussianBlur(noise, (0, 0), 3) * 4 - 384, 0, 255).astype(np.uint8)]
    return found


def _picture(photograph: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    import cv2

    # A log-normal with mean 1.
    pixels = MEAN_PIXELS * math.exp(generator.normal(-(_SPREAD**2) / 2, _SPREAD))
    aspect = _ASPECTS[generator.integers(len(_ASPECTS))]
    width, height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    source_height, source_width = photograph.shape[:2]
    scale = max(width / source_width, height / source_height) * generator.uniform(1.0, 1.6)
    turn = cv2.getRotationMatrix2D((source_width / 2, source_height / 2), generator.uniform(-8, 8), scale)
    turn[:, 2] += np.array([width, height]) / 2 - np.array([source_width, source_height]) / 2
    warped = cv2.warpAffine(photograph, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    grain = generator.standard_normal((height, width, 1), dtype=np.float32) * 5
    coloured = warped * generator.uniform(0.8, 1.2, size=3).astype(np.float32) + grain
    return np.clip(coloured, 0, 255).astype(np.uint8)


def _add(archive: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    archive.addfile(member, io.BytesIO(payload))
