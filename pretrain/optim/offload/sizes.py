"""Bytes of host and device memory that a plan takes. Torch-free.

The same buffers as :class:`~pretrain.optim.offload.memory.Memory` makes, for state, gradients and weights of one width.
"""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.optim.offload.constants import Widths
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.subgroups import Subgroup

MOMENTS = 8  # bytes of both moments per element


def slot_bytes(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths) -> dict[int, int]:
    """Bytes by device buffer: the largest state that it is ever given."""
    sizes: dict[int, int] = {}
    for turn, subgroup in enumerate(plan.streamed):
        slot = plan.slot(turn)
        sizes[slot] = max(sizes.get(slot, 0), subgroups[subgroup].numel * widths.state)
    return sizes


def device_parts(plan: Plan, subgroups: Sequence[Subgroup], widths: Widths) -> dict[str, int]:
    """Bytes of device memory by what they hold; early buffers only from the last backward to the next forward pass."""
    slots = slot_bytes(plan, subgroups, widths)
    resident = sum(subgroups[i].numel for i, place in enumerate(plan.places) if place is Place.RESIDENT)
    return {
        "resident state": resident * widths.state,
        "buffers": sum(size for slot, size in slots.items() if slot < plan.num_slots),
        "early buffers": sum(size for slot, size in slots.items() if slot >= plan.num_slots),
    }


def host_parts(
    plan: Plan, subgroups: Sequence[Subgroup], widths: Widths, *, host_weights: bool = False
) -> dict[str, int]:
    """Bytes of host memory by what they hold. With ``host_weights`` the device's memory is the host's too."""
    offloaded = sum(
        subgroup.numel for subgroup in subgroups if plan.places[subgroup.index] is not Place.RESIDENT or host_weights
    )
    parts = {
        "moments": MOMENTS * offloaded,
        "master weights": (widths.state - MOMENTS) * offloaded,
        "gradients": 0,
        "updated weights": 0,
        "buffers": 0,
    }
    if host_weights:
        parts["buffers"] = sum(slot_bytes(plan, subgroups, widths).values())
        return parts
    sizes = [subgroups[i].numel for i in plan.cpu_order]
    ring = sum(max(sizes[buffer :: plan.num_host_buffers], default=0) for buffer in range(plan.num_host_buffers))
    parts["gradients"] = widths.gradient * (sum(sizes) if plan.early_gradients else ring)
    parts["updated weights"] = widths.weight * ring
    return parts
