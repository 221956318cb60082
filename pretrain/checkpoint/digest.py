"""Digests of canonical state that do not depend on the layout.

The digest of a logical tensor is a sum over its elements of a hash of (position in the tensor, bits of the value),
modulo 2^64. Ranks add up what they hold, so the sum over ranks is the same for every way to share the tensor, and
differs when any bit of any element differs, when two elements change places, or when one is held twice or by nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.checkpoint.fragment import Fragment
from pretrain.parallel.shard import Shard

MODULUS = 1 << 64
_CHUNK = 1 << 20  # elements hashed at once: 8 MiB for each of a few int64 temporaries
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(value: int) -> int:
    return value - MODULUS if value >= MODULUS // 2 else value


# splitmix64 (Steele, Lea & Flood, OOPSLA 2014): the increment, and the multipliers of its finaliser.
_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def fragment_digest(fragment: Fragment) -> int:
    """Part of the digest of ``fragment.name`` that this fragment contributes, in [0, 2^64)."""
    flat = fragment.values.detach().reshape(-1)
    total = 0
    for low in range(0, flat.numel(), _CHUNK):
        values = flat[low : low + _CHUNK]
        start = fragment.start + low
        index = flat_indices(fragment.shard, start, start + values.numel(), values.device)
        # The position is mixed before the bits come in: otherwise neighbours could trade bits for places.
        mixed = _mix_((index + 1).mul_(_INCREMENT)).add_(_bits(values))
        total += int(_mix_(mixed).sum())
    return total % MODULUS


def flat_indices(shard: Shard, start: int, stop: int, device: torch.device) -> Tensor:
    """Positions in the row-major whole tensor of the shard's own elements ``[start, stop)``; int64, 1-D."""
    local = torch.arange(start, stop, device=device)
    if shard.is_contiguous:
        return local.add_(shard.start)
    rows = torch.div(local, shard.width, rounding_mode="floor")
    return local.sub_(rows * shard.width).add_(rows.mul_(shard.row_length)).add_(shard.start)


def _bits(values: Tensor) -> Tensor:
    """The raw bits of each element as int64, high bits zero for narrower types."""
    size = values.element_size()
    wide = values.contiguous().view(_INTEGERS[size]).to(torch.int64)
    return wide if size == 8 else wide & ((1 << 8 * size) - 1)


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finaliser in place: a bijection of 64-bit words. int64 products and sums wrap around."""
    for shift, multiplier in ((30, _FIRST), (27, _SECOND)):
        x.bitwise_xor_(_shifted(x, shift)).mul_(multiplier)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Logical right shift, which torch has not for int64."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
