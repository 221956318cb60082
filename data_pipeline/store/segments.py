"""How large the segments of a sample dataset are, and how many lanes it recommends."""

from __future__ import annotations

from collections.abc import Sequence

_LARGEST_SEGMENT = 1 << 24
_SEGMENTS_WANTED, _SEGMENTS_PER_LANE, _MOST_LANES = 320, 4, 1024


def choose_segments(shards: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """(segment bytes, lanes) for training shards given as (payload bytes, samples, bytes of the largest sample).

    A segment is 16 MiB, or 1/320 of a smaller set. Lanes are the power of two, at most 1,024, that surely has four
    segments for each: a segment is closed by the sample with which it reaches its size, and ends with its shard.
    """
    total = sum(payload for payload, _, _ in shards)
    segment_bytes = max(1, min(_LARGEST_SEGMENT, total // _SEGMENTS_WANTED))
    segments = sum(
        max(1, min(samples, payload // max(1, segment_bytes + largest - 1)))
        for payload, samples, largest in shards
        if samples
    )
    lanes = max(1, segments // _SEGMENTS_PER_LANE)
    return segment_bytes, min(_MOST_LANES, 1 << (lanes.bit_length() - 1))
