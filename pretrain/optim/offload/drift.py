"""What has changed since a plan was made, in words. Torch-free."""

from __future__ import annotations

import math
from dataclasses import fields

from pretrain.optim.offload.constants import Constants, Window

DRIFT = 0.10
"""Change of a constant, as a share, from which on a plan is made anew."""
WINDOW_DRIFT = 0.25
"""Change of the passes around the update, as a share of their length or of the update's, whichever is less telling."""


def constants_drift(before: Constants, now: Constants) -> list[str]:
    """Rates that differ by more than :data:`DRIFT`, one line each; empty when none does."""
    found = []
    for name in (field.name for field in fields(Constants) if field.name != "latency"):
        old, new = getattr(before, name), getattr(now, name)
        if abs(math.log(new / old)) > math.log1p(DRIFT):
            found.append(f"{name} {new:.3g}, was {old:.3g} ({new / old - 1:+.0%})")
    return found


def window_drift(before: Window, now: Window, *, update_s: float, unit_bytes: int) -> list[str]:
    """What differs by so much that a plan may: times by more than :data:`WINDOW_DRIFT` of themselves and by a tenth of
    that of ``update_s``, memory by ``unit_bytes`` (a subgroup's state) or more."""
    found = []
    for name in ("backward_s", "forward_s"):
        old, new = getattr(before, name), getattr(now, name)
        if abs(new - old) > WINDOW_DRIFT * max(old, update_s / 10):
            found.append(f"{name} {new:.4g}, was {old:.4g}")
    for name in ("device_bytes", "early_bytes"):
        old, new = getattr(before, name), getattr(now, name)
        if abs(new - old) >= max(1, unit_bytes):
            found.append(f"{name} {new}, was {old}")
    return found
