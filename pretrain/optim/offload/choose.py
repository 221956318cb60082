"""Device and plan for where the weights are, and whether the plan fits, before anything is allocated."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import Device, InlineDevice
from pretrain.optim.offload.host_memory import require_host_memory
from pretrain.optim.offload.memory import Shape
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.parallel.process import gather_objects, world_size


def choose_device(weights: Sequence[Tensor], config: OffloadConfig) -> Device:
    """The device that the weights are on: a GPU, or the host."""
    device = weights[0].device if weights else None
    if device is not None and device.type == "cuda":
        from pretrain.optim.offload.cuda import CudaDevice

        return CudaDevice(device, config.cpu_threads)
    return InlineDevice(config.cpu_threads)


def choose_plan(shape: Shape, config: OffloadConfig, device: Device) -> Plan:
    """The plan to begin with: computed from a short probe on a GPU; on the host, where nothing runs at the same time,
    the shares that the configuration names (``auto``: 0), spread evenly.

    Raises:
        ValueError: buffers or resident state do not fit into device memory.
    """
    if device.host_weights:
        return even_plan(shape, _share(config.fraction), _share(config.resident_fraction), overlap=config.overlap)
    from pretrain.optim.offload.online import first_plan

    return first_plan(shape, config, device)


def even_plan(shape: Shape, fraction: float, resident_fraction: float, *, overlap: bool) -> Plan:
    """``resident_fraction`` of all elements resident, of the others ``fraction`` streamed, each as near as subgroups
    allow, every kind evenly among the others."""
    sizes = [subgroup.numel for subgroup in shape.subgroups]
    is_resident = _spread(sizes, resident_fraction)
    others = [i for i, resident in enumerate(is_resident) if not resident]
    is_streamed = dict(zip(others, _spread([sizes[i] for i in others], fraction), strict=True))
    places = tuple(
        Place.RESIDENT if is_resident[i] else Place.STREAM if is_streamed[i] else Place.CPU for i in range(len(sizes))
    )
    streamed = sum(is_streamed.values())
    num_slots = min(3, streamed)
    return Plan(
        places,
        device_order=tuple(i for i, place in enumerate(places) if place is not Place.CPU),
        cpu_order=tuple(i for i, place in enumerate(places) if place is Place.CPU),
        num_slots=num_slots,
        num_early=num_slots if overlap else 0,
        early_gradients=overlap,
    )


def _spread(sizes: Sequence[int], share: float) -> list[bool]:
    """Which of the subgroups are taken so that at every point about ``share`` of the elements is."""
    chosen: list[bool] = []
    seen = taken = 0
    for size in sizes:
        seen += size
        chosen.append(share > 0 and taken + size / 2 <= share * seen)
        taken += size * chosen[-1]
    return chosen


def _share(value: str | float) -> float:
    return 0.0 if isinstance(value, str) else float(value)


def require_on_every_rank(
    needed: dict[str, int], limit_gib: float | None, *, pinned: bool, failure: Exception | None = None
) -> None:
    """Refuse, on all ranks together and before any of them allocates, what does not fit into host memory. Collective
    over the default group where there is one.

    Args:
        failure: why this rank has no plan; then no rank goes on.

    Raises:
        ValueError: it does not fit here, or on another rank's host; another rank failed.
        Exception: ``failure``.
    """
    if failure is None and world_size() == 1:
        require_host_memory(needed, limit_gib=limit_gib, ranks_on_host=1, pinned=pinned)
        return
    plans = gather_objects(None if failure is None else f"{failure}")
    if failure is not None:
        raise failure
    if failures := {f"rank {rank}: {text}": None for rank, text in enumerate(plans) if text is not None}:
        raise ValueError("\n".join(failures))
    totals = gather_objects((socket.gethostname(), sum(needed.values())))
    mine = sum(total for host, total in totals if host == socket.gethostname())
    fault = None
    try:
        ranks = sum(host == socket.gethostname() for host, _ in totals)
        # Shares differ a little between ranks: what counts is their sum.
        scaled = dict(needed)
        rest = mine - ranks * sum(needed.values())
        if rest > 0:
            scaled["larger shares of other ranks"] = -(-rest // ranks)
        require_host_memory(scaled, limit_gib=limit_gib, ranks_on_host=ranks, pinned=pinned)
    except ValueError as error:
        fault = f"{error}"
    faults = {text: None for text in gather_objects(fault) if text is not None}
    if faults:
        raise ValueError("\n".join(faults))
