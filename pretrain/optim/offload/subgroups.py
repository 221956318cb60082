"""Flat optimizer state cut into subgroups: the unit that is placed, moved and updated. Torch-free.

A *target* is a flat range of weights that this rank updates (a parameter, or its shard). Targets of one parameter group
are laid end to end and cut every ``size`` elements, so that a large target spans several subgroups and small ones share
one. The cut decides nothing about values: AdamW works element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """``numel`` weights that are updated with the settings of parameter group ``group``."""

    numel: int
    group: int


@dataclass(frozen=True)
class Segment:
    """Elements ``[start, stop)`` of target number ``target``; they lie in the subgroup from element ``offset`` on."""

    target: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Subgroup:
    """``numel`` elements of one parameter group."""

    index: int
    group: int
    numel: int
    segments: tuple[Segment, ...]


def cut_subgroups(targets: Sequence[Target], size: int) -> tuple[Subgroup, ...]:
    """Subgroups of ``size`` elements, the last of each parameter group with what is left.

    Raises:
        ValueError: ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"subgroup_size is {size}, expected a positive number of elements")
    made: list[Subgroup] = []
    for group in sorted({target.group for target in targets}):
        segments: list[Segment] = []
        filled = 0
        for number, target in enumerate(targets):
            if target.group != group:
                continue
            start = 0
            while start < target.numel:
                stop = min(target.numel, start + size - filled)
                segments.append(Segment(number, start, stop, filled))
                filled += stop - start
                start = stop
                if filled == size:
                    made.append(Subgroup(len(made), group, filled, tuple(segments)))
                    segments, filled = [], 0
        if filled:
            made.append(Subgroup(len(made), group, filled, tuple(segments)))
    return tuple(made)
