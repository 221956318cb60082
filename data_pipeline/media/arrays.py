"""Arrays of any shape from ``.npy`` bytes, never through pickle: latents, conditioning, token ids."""

from __future__ import annotations

import io

import numpy as np
from numpy.lib import format as npy_format

from data_pipeline.media.decode import DecodeError

LATENT_DTYPES = ("<f2", "<u2", "<f4")
CONDITIONING_DTYPES = LATENT_DTYPES
TOKEN_DTYPES = ("<u2", "<u4")


def array_bytes(array: np.ndarray) -> bytes:
    """``array`` as a version 1.0 ``.npy`` file in C order."""
    stream = io.BytesIO()
    npy_format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def parse_array(payload: bytes | memoryview, dtypes: tuple[str, ...], num_dims: tuple[int, ...]) -> np.ndarray:
    """The array in ``payload`` as a read-only view of it.

    Raises DecodeError unless it is a C-ordered array of one of ``dtypes`` with one of ``num_dims`` dimensions that
    fills the payload exactly; object arrays are refused before any of their bytes is looked at.
    """
    stream = io.BytesIO(payload)
    try:
        version = npy_format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} is neither (1, 0) nor (2, 0)")
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DecodeError(f"not an .npy file: {error}") from None
    if dtype.hasobject:
        raise DecodeError("an object array: it can only be read by running pickle, which is never done")
    if dtype.str not in dtypes:
        raise DecodeError(f"dtype {dtype.str!r} is not one of {', '.join(dtypes)}")
    if len(shape) not in num_dims or 0 in shape:
        wanted = " or ".join(map(str, num_dims))
        raise DecodeError(f"shape {shape} is not one of {wanted} dimensions without an empty one")
    if fortran and len(shape) > 1:
        raise DecodeError("stored in Fortran order, expected C order (numpy.ascontiguousarray)")
    start, size = stream.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(payload) - start != size:
        raise DecodeError(f"holds {len(payload) - start} bytes of data, its header says {size}")
    return np.frombuffer(payload, dtype=dtype, offset=start).reshape(shape)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 given as its uint16 bits, as the float32 of exactly the same value."""
    return (bits.astype("<u4") << 16).view("<f4")


def as_float(array: np.ndarray) -> np.ndarray:
    """float16 and float32 as they are, uint16 taken for the bits of bfloat16."""
    return bfloat16_to_float32(array) if array.dtype == np.uint16 else array
