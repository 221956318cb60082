"""From JPEG bytes to uint8 [256, 256, 3]: shorter side to 256 pixels, centre crop. For the contenders that decode
themselves."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

SIZE = 256
BATCH = 32
CAPTION_TOKENS = 64


def with_simplejpeg(payload: bytes) -> np.ndarray:
    """libjpeg-turbo with its scaled DCT, then area averaging: the fastest way that was found."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(payload)
    height, width = _scaled(height, width)
    pixels = simplejpeg.decode_jpeg(payload, min_height=height, min_width=width)
    return _centre(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))


def with_pil(payload: bytes) -> np.ndarray:
    """What a data set of torchvision does: decode, resize (bilinear with its support), crop."""
    image = Image.open(io.BytesIO(payload)).convert("RGB")
    height, width = _scaled(image.height, image.width)
    return _centre(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)))


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"simplejpeg": with_simplejpeg, "pil": with_pil}


def padded(token_ids: np.ndarray) -> np.ndarray:
    """int32 [64]."""
    out = np.zeros(CAPTION_TOKENS, dtype=np.int32)
    out[: len(token_ids)] = token_ids[:CAPTION_TOKENS]
    return out


def _scaled(height: int, width: int) -> tuple[int, int]:
    short = min(height, width)
    return max(SIZE, round(height * SIZE / short)), max(SIZE, round(width * SIZE / short))


def _centre(pixels: np.ndarray) -> np.ndarray:
    top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
    return pixels[top : top + SIZE, left : left + SIZE]
