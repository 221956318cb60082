"""Bytes of host and device memory that a plan takes, by buffer and by what they hold. Torch-free.

``widths`` are those of all subgroups, or of each by its number.
"""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.optim.offload.constants import Widths
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.subgroups import Subgroup

MOMENTS = 8  # bytes of both moments per element


def slot_bytes(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths | Sequence[Widths]) -> dict[int, int]:
    """Bytes by device buffer: the largest state that it is ever given."""
    sizes: dict[int, int] = {}
    each = _by_subgroup(widths, subgroups)
    for turn, subgroup in enumerate(plan.streamed):
        # Where there is no memory for early buffers, those of the ring are given all (Plan.without_early_buffers).
        for slot in (plan.slot(turn), turn % plan.num_slots):
            sizes[slot] = max(sizes.get(slot, 0), subgroups[subgroup].numel * each[subgroup].state)
    return sizes


def gradient_bytes(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths | Sequence[Widths]) -> dict[int, int]:
    """Bytes by host buffer of gradients."""
    sizes: dict[int, int] = {}
    each = _by_subgroup(widths, subgroups)
    for turn, subgroup in enumerate(plan.cpu_order):
        buffer = turn if plan.early_gradients else turn % plan.num_host_buffers
        sizes[buffer] = max(sizes.get(buffer, 0), subgroups[subgroup].numel * each[subgroup].gradient)
    return sizes


def staged_bytes(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths | Sequence[Widths]) -> dict[int, int]:
    """Bytes by host buffer of updated weights."""
    sizes: dict[int, int] = {}
    each = _by_subgroup(widths, subgroups)
    for turn, subgroup in enumerate(plan.cpu_order):
        buffer = turn % plan.num_host_buffers
        sizes[buffer] = max(sizes.get(buffer, 0), subgroups[subgroup].numel * each[subgroup].weight)
    return sizes


def device_parts(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths | Sequence[Widths]) -> dict[str, int]:
    """Bytes of device memory by what they hold; early buffers only from the last backward to the next forward pass."""
    slots = slot_bytes(plan, subgroups, widths)
    each = _by_subgroup(widths, subgroups)
    resident = [i for i, place in enumerate(plan.places) if place is Place.RESIDENT]
    return {
        "resident state": sum(subgroups[i].numel * each[i].state for i in resident),
        "buffers": sum(size for slot, size in slots.items() if slot < plan.num_slots),
        "early buffers": sum(size for slot, size in slots.items() if slot >= plan.num_slots),
    }


def host_parts(
    plan: Plan, subgroups: Sequence[Subgroup], widths: Widths | Sequence[Widths], *, host_weights: bool = False
) -> dict[str, int]:
    """Bytes of host memory by what they hold. With ``host_weights`` the device's memory is the host's too."""
    each = _by_subgroup(widths, subgroups)
    offloaded = [i for i, place in enumerate(plan.places) if place is not Place.RESIDENT or host_weights]
    parts = {
        "moments": sum(MOMENTS * subgroups[i].numel for i in offloaded),
        "master weights": sum((each[i].state - MOMENTS) * subgroups[i].numel for i in offloaded),
        "gradients": 0,
        "updated weights": 0,
        "buffers": 0,
    }
    if host_weights:
        parts["buffers"] = sum(slot_bytes(plan, subgroups, widths).values())
    else:
        parts["gradients"] = sum(gradient_bytes(plan, subgroups, widths).values())
        parts["updated weights"] = sum(staged_bytes(plan, subgroups, widths).values())
    return parts


def _by_subgroup(widths: Widths | Sequence[Widths], subgroups: Sequence[Subgroup]) -> Sequence[Widths]:
    return [widths] * len(subgroups) if isinstance(widths, Widths) else widths
