"""Random draws that depend on what they are for, not on who draws them or when.

A generator is derived from a key such as `(seed, step, global sample index, "dropout", layer)` or
`(seed, "layers.3.mixer.A_log")`. Nothing is remembered between draws, so the values do not depend on the rank,
the number of ranks, the order of the calls or on a restart, and there is no random state to checkpoint.
"""

from __future__ import annotations

import hashlib

import torch

KeyPart = int | str | bool | None | tuple["KeyPart", ...]


def keyed_seed(*key: KeyPart) -> int:
    """A 64-bit seed for `key`: BLAKE2b of the key's repr; equal keys, and only those, give equal seeds.

    Raises:
        ValueError: for an empty key, or for parts whose repr does not identify their value (a tensor, a float
            or an object's address, say).
    """
    if not key:
        raise ValueError("keyed_seed: the key is empty; pass at least a seed")
    _check(key)
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def keyed_generator(*key: KeyPart, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator seeded by `keyed_seed(*key)`.

    The same key gives the same numbers in every process. Draw on the CPU (the default) and copy where the
    numbers must also not depend on the kind of device: torch's CPU and CUDA generators differ.
    """
    return torch.Generator(device=device).manual_seed(keyed_seed(*key))


def _check(parts: tuple[KeyPart, ...]) -> None:
    for part in parts:
        if isinstance(part, tuple):
            _check(part)
        elif part is not None and type(part) not in (int, str, bool):
            raise ValueError(
                f"keyed_seed: key part {part!r} is a {type(part).__name__}, expected int, str, bool, None or a "
                "tuple of these; convert it (numpy integers with int())"
            )
