"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 file``, ``0 files``, ``1,234 files``: ``noun`` is one whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
