"""Free device memory over the phases of a step, as CUDA and torch's caching allocator tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pretrain.optim.offload.host_memory import available_host_bytes
from pretrain.parallel.peak_memory import lap_peak_bytes

MARGIN_SHARE = 0.02
"""Of the device's memory that is left alone, for fragmentation and for what other libraries take."""
MARGIN_BYTES = 1 << 30
"""At least so much is left alone."""


@dataclass(frozen=True)
class Room:
    """Bytes. ``usable``: what this process may hold in all, what it holds included, less the margin. ``peak``: most
    that its tensors took since the last look; ``held``: what they take now."""

    usable: int
    peak: int
    held: int


class MemoryLook(Protocol):
    """Tells of memory; asked at the end of an update, at the beginning of the last backward pass and at its end."""

    def __call__(self) -> Room: ...


class CudaMemory:
    """Looks at ``device``, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.margin = margin_bytes(torch.cuda.get_device_properties(device).total_memory)

    def __call__(self) -> Room:
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device)
        taken = torch.cuda.memory_allocated(self._device)
        return Room(max(0, free + held - self.margin), lap_peak_bytes(self._device), taken)


def free_device_bytes(device: torch.device) -> int:
    """What may be allocated on ``device`` now, less the margin: free by CUDA, or in whole segments that torch's caching
    allocator could give back. Of the host in a device's place: its free memory.

    Not counted is what was freed but another stream may still use (``record_stream``; *active* to the allocator until
    that stream is through), nor free parts of segments in use (*inactive split*), which serve one stream and may be too
    small each.
    """
    if device.type != "cuda":
        return available_host_bytes() or 0
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    cached, active, split = (
        stats.get(f"{name}_bytes.all.current", 0) for name in ("reserved", "active", "inactive_split")
    )
    return max(0, free + max(0, cached - active - split) - margin_bytes(total))


def margin_bytes(total: int) -> int:
    return max(MARGIN_BYTES, int(MARGIN_SHARE * total))


class Envelope:
    """The model's own memory over steps: the most that its tensors took in a step, and what they took when the last
    backward pass was over. Memory of the offloading is taken out, so that plans may differ.

    State that is brought early takes what the backward pass sets free, piece by piece, so its peak tells nothing of the
    model's: in such steps the model's peak is that of the time before, or of earlier steps.

    ``last``: steps whose highest counts.
    """

    def __init__(self, last: int = 50) -> None:
        self._last = last
        self._steps: list[tuple[int, int]] = []
        self._usable: int | None = None
        self._before = 0

    def add_before_early(self, room: Room, own: int) -> None:
        """At the beginning of the last backward pass; ``own``: bytes of the offloading until now."""
        self._before = max(0, room.peak - own)
        self._usable = room.usable

    def add_before_update(self, room: Room, own: int, early: int = 0) -> None:
        """At the end of the last backward pass; ``early``: bytes of state that was brought in it, besides ``own``."""
        level = max(0, room.held - own - early)
        highest = max([self._before, level, *(peak for peak, _ in self._steps)])
        peak = highest if early else max(self._before, room.peak - own, level)
        self._steps.append((peak, level))
        del self._steps[: -self._last]
        self._usable = room.usable if self._usable is None else min(self._usable, room.usable)

    @property
    def is_known(self) -> bool:
        return bool(self._steps)

    @property
    def device_bytes(self) -> int:
        """What the offloading may take all the time."""
        assert self._usable is not None, "add steps first"
        return max(0, self._usable - max(peak for peak, _ in self._steps))

    @property
    def early_bytes(self) -> int:
        """What the last backward pass sets free besides, until it is over."""
        assert self._usable is not None, "add steps first"
        return max(0, self._usable - max(level for _, level in self._steps)) - self.device_bytes
