"""Numbers of command lines, and what is too much for them. Torch-free."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

# More than any byte count, rate or number of parameters that there is.
MOST = 1e18
MOST_SUBGROUPS = 100_000


def positive(text: str) -> float:
    """A number above 0 and at most MOST."""
    value = _number(text)
    if not 0 < value <= MOST:
        raise ArgumentTypeError(f"found {text}, expected a number above 0 and at most {MOST:g}")
    return value


def count(text: str) -> int:
    """A whole number above 0 that may be written 8e9."""
    value = positive(text)
    if value != int(value):
        raise ArgumentTypeError(f"found {text}, expected a whole number such as 8e9")
    return int(value)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"found {text}, expected a share from 0 to 1")
    return value


def check_number(elements: int, subgroup_size: int) -> None:
    """Raises:
    ValueError: ``elements`` make more subgroups of ``subgroup_size`` than can be planned.
    """
    number = -(-elements // subgroup_size)
    if number > MOST_SUBGROUPS:
        raise ValueError(
            f"{elements:,} elements of a rank in subgroups of {subgroup_size:,} are {number:,} subgroups, expected at "
            f"most {MOST_SUBGROUPS:,}: raise subgroup_size (100000000 is usual), or use more ranks"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
