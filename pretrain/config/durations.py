"""Slurm's way to write a duration. Torch-free."""

from __future__ import annotations

import re

_DURATION = re.compile(
    r"^(?:(?P<days>\d+)-(?P<dh>\d{1,2})(?::(?P<dm>\d{1,2})(?::(?P<ds>\d{1,2}))?)?"
    r"|(?P<h>\d+):(?P<hm>\d{1,2}):(?P<hs>\d{1,2})"
    r"|(?P<m>\d+)(?::(?P<ms>\d{1,2}))?)$"
)


def parse_duration(text: str) -> float | None:
    """Seconds of one of Slurm's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None for any other text (``UNLIMITED``)."""
    match = _DURATION.match(text.strip())
    if match is None:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = part["dh"] + part["h"]
    minutes = part["dm"] + part["hm"] + part["m"]
    seconds = part["ds"] + part["hs"] + part["ms"]
    return float(((part["days"] * 24 + hours) * 60 + minutes) * 60 + seconds)
