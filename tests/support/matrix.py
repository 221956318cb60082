"""Choosing few cases of a large matrix, so that every combination of two settings still meets.

Ordinary runs take a subset that changes with the commit; ``PRETRAIN_FULL_MATRIX=1`` takes all of it. To repeat the
subset of another commit, set ``PRETRAIN_MATRIX_SEED`` to its hash.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

Case = TypeVar("Case", bound=tuple[Any, ...])


def pairwise(cases: Sequence[Case], always: Sequence[Case] = ()) -> list[Case]:
    """A subset of ``cases`` (tuples of one value per factor) in which each pair of values that occurs in one of them
    occurs again; ``always`` are in it. The order is that of ``cases``."""
    assert all(case in cases for case in always), f"{always} must be among the cases"
    if os.environ.get("PRETRAIN_FULL_MATRIX") == "1":
        return list(cases)
    pool = list(cases)
    random.Random(_seed()).shuffle(pool)
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = list(always)
    for case in chosen:
        missing -= _pairs(case)
    while missing:
        best = max(pool, key=lambda case: len(_pairs(case) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return [case for case in cases if case in chosen]


def rotating(cases: Sequence[Case], count: int, always: Sequence[Case] = ()) -> list[Case]:
    """``count`` of ``cases``, those in ``always`` among them; the order is that of ``cases``."""
    assert all(case in cases for case in always), f"{always} must be among the cases"
    if os.environ.get("PRETRAIN_FULL_MATRIX") == "1":
        return list(cases)
    others = [case for case in cases if case not in always]
    random.Random(_seed()).shuffle(others)
    chosen = [*always, *others[: max(0, count - len(always))]]
    return [case for case in cases if case in chosen]


def one_each(cases: Sequence[Case]) -> list[Case]:
    """One of ``cases`` for each value of their first factor; the other factors change with the commit."""
    if os.environ.get("PRETRAIN_FULL_MATRIX") == "1":
        return list(cases)
    pool = list(cases)
    random.Random(_seed()).shuffle(pool)
    chosen = {repr(case[0]): case for case in pool}
    return [case for case in cases if case in chosen.values()]


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    if len(case) == 1:
        return {(0, repr(case[0]))}
    return {(i, repr(case[i]), j, repr(case[j])) for i, j in combinations(range(len(case)), 2)}


def _seed() -> str:
    if seed := os.environ.get("PRETRAIN_MATRIX_SEED"):
        return seed
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"  # an unpacked archive
