"""The frame of a shard: all its bytes that are no payload, so headers, padding and the end marker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import xxhash

from data_pipeline.store import tar

_PIECE = 1 << 20


def frame_hash(stream: BinaryIO, payloads: Iterable[tuple[int, int]], size: int) -> str:
    """xxh3 in hex over the bytes of ``stream`` (``size`` in all) outside ``payloads`` (offset, length; ascending)."""
    digest = xxhash.xxh3_64()
    position = 0
    for offset, length in (*payloads, (size, 0)):
        stream.seek(position)
        while position < offset:
            piece = stream.read(min(offset - position, _PIECE))
            if not piece:
                return digest.hexdigest()
            digest.update(piece)
            position += len(piece)
        position = offset + length
    return digest.hexdigest()


def is_canonical(stream: BinaryIO, member: tar.TarMember) -> bool:
    """Whether the header of ``member`` is, byte for byte, the one that our own writers write."""
    stream.seek(member.offset - tar.BLOCK)
    return stream.read(tar.BLOCK) == tar.member_header(member.name, member.length)
