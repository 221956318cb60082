"""One-dimensional ``.npy`` arrays to and from bytes, never through pickle."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

ALLOWED_DTYPES = ("<u2", "<u4", "<i8")
# What npy_bytes writes. NumPy compiles a header as Python to read it, which costs more than reading a small block.
_PLAIN_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00\{'descr': '(<u2|<u4|<i8)', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n"
)
_PLAIN_LENGTH = 128


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` (one dimension, dtype of ``ALLOWED_DTYPES``) as a version 1.0 ``.npy`` file."""
    assert array.ndim == 1
    assert array.dtype.str in ALLOWED_DTYPES
    stream = io.BytesIO()
    npy_format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def parse_npy(payload: bytes | memoryview) -> np.ndarray:
    """The array in ``payload`` as a read-only view of it.

    Raises ValueError for anything but a little-endian, one-dimensional array of an allowed dtype that fills
    the payload exactly; object arrays are refused before any of their bytes is looked at.
    """
    shape, dtype, start = _header(payload)
    if dtype.hasobject or dtype.str not in ALLOWED_DTYPES:
        raise ValueError(f"npy dtype {dtype.str!r} is not one of {', '.join(ALLOWED_DTYPES)}")
    if len(shape) != 1:
        raise ValueError(f"npy shape {shape} is not one-dimensional")
    if len(payload) - start != shape[0] * dtype.itemsize:
        found = len(payload) - start
        raise ValueError(f"npy payload has {found} bytes, its header says {shape[0] * dtype.itemsize}")
    return np.frombuffer(payload, dtype=dtype, offset=start)


def _header(payload: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and where the data begin."""
    plain = _PLAIN_HEADER.fullmatch(bytes(payload[:_PLAIN_LENGTH]))
    if plain is not None:
        return (int(plain[2]),), np.dtype(plain[1].decode()), _PLAIN_LENGTH
    # A header of this version is at most 64 KiB; the data need not be copied.
    stream = io.BytesIO(bytes(payload[: (1 << 16) + 10]))
    version = npy_format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version} is not (1, 0)")
    shape, _, dtype = npy_format.read_array_header_1_0(stream)
    return shape, dtype, stream.tell()
