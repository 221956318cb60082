"""What the planner knows of the machine and of a step. Torch-free; every number is measured or stated, none assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Rates of one rank's share of its host and link.

    ``h2d``, ``d2h``: bytes/s host to device and back, one way at a time. ``h2d_duplex``, ``d2h_duplex``: both at once.
    ``link_with_cpu``: factor (0, 1] on all of them while the CPU updates. ``cpu_adam``: elements/s of the fused CPU
    update by itself; ``cpu_adam_with_link``: while both directions are busy. ``gpu_adam``: elements/s on the device.
    ``latency``: seconds that every operation costs besides (launch, event).
    """

    h2d: float
    d2h: float
    h2d_duplex: float
    d2h_duplex: float
    link_with_cpu: float
    cpu_adam: float
    cpu_adam_with_link: float
    gpu_adam: float
    latency: float = 20e-6


@dataclass(frozen=True)
class Widths:
    """Bytes per element: of the state that moves (12 with an FP32 master, 10 with its low half, 8 where the FP32 weight
    is the master), of a gradient as it crosses to the host, and of a weight. ``weight_down``: the host needs the weight
    too before it can update (it is, or holds part of, the master)."""

    state: int = 12
    gradient: int = 4
    weight: int = 2
    weight_down: bool = False


@dataclass(frozen=True)
class Window:
    """What surrounds the update of a step: memory in bytes, time in seconds.

    ``device_bytes``: free device memory that buffers and resident subgroups may take all the time. ``early_bytes``:
    what the last backward pass sets free besides, for prefetched state. ``backward_s``: the part of the last backward
    pass in which that memory is free already; ``forward_s``: the next forward pass, in which state may flow back.
    ``host_bytes``: host memory that state and buffers may take; None: no limit.
    """

    device_bytes: int = 0
    early_bytes: int = 0
    backward_s: float = 0.0
    forward_s: float = 0.0
    host_bytes: int | None = None
