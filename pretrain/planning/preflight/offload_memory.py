"""Host memory that ``optimizer.offload`` takes, from the configuration alone. Torch-free.

The plan of a run is made from measured rates when it starts; what does not depend on it is certain, the rest is what a
plan may take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config.layout import data_parallel_size, model_parallel_size
from pretrain.config.schema import Config, OffloadConfig, OptimizerConfig
from pretrain.optim.offload.host_memory import widths_of
from pretrain.planning.preflight.findings import Finding, error
from pretrain.planning.preflight.units import GIB, size

NUM_BUFFERS = 3
"""Host buffers of weights that CPU updates cycle through, and device buffers of state."""


@dataclass(frozen=True)
class OffloadNeed:
    """Bytes of one rank: ``state`` that lies on the host, ``buffers`` that every plan has (of gradients and updated
    weights, or of state on its way), ``at_most`` what a plan takes besides where there is room: the gradients of all
    that the CPU updates at once, to overlap, and all buffers where ``fraction`` is auto."""

    state: float
    buffers: float
    at_most: float

    @property
    def certain(self) -> float:
        return self.state + self.buffers


def offload_of(config: Config) -> OffloadConfig | None:
    """The block where it is in force."""
    optimizer = config.optimizer
    return optimizer.offload if isinstance(optimizer, OptimizerConfig) and optimizer.offload.enabled else None


def offload_need(config: Config, parameters: int, uses_gpu: bool) -> OffloadNeed:
    """What one rank of a run that offloads takes of its host; ``parameters``: of the whole model."""
    offload = offload_of(config)
    assert offload is not None
    widths = widths_of(config.train.precision, offload.master)
    # Shards of the optimizer: every stage that can offload cuts it over the data-parallel ranks.
    held = parameters / model_parallel_size(config.engine) / max(data_parallel_size(config), 1)
    ring = min(NUM_BUFFERS * offload.subgroup_size, held)
    if not uses_gpu:
        # Nothing is far away: gradients and weights are used where they are, and auto moves nothing.
        moved = offload.fraction if isinstance(offload.fraction, float | int) else 0.0
        return OffloadNeed(held * widths.state, min(ring, held * moved) * widths.state, 0.0)
    resident = offload.resident_fraction if isinstance(offload.resident_fraction, float | int) else 0.0
    offloaded = held * (1 - resident)
    on_cpu = offloaded * (1 - offload.fraction) if isinstance(offload.fraction, float | int) else offloaded
    in_turn = min(ring, on_cpu) * (widths.gradient + widths.weight)
    at_once = (on_cpu - min(ring, on_cpu)) * widths.gradient if offload.overlap else 0.0
    if isinstance(offload.fraction, str):
        return OffloadNeed(offloaded * widths.state, 0.0, in_turn + at_once)
    return OffloadNeed(offloaded * widths.state, in_turn, at_once)


def limit_of_a_rank(config: Config, parameters: int, uses_gpu: bool) -> Iterator[Finding]:
    """``optimizer.offload.host_memory_gib`` against what is certain."""
    offload = offload_of(config)
    if offload is None or offload.host_memory_gib is None:
        return
    need = offload_need(config, parameters, uses_gpu)
    limit = offload.host_memory_gib * GIB
    if need.certain > limit:
        yield error(
            "optimizer.offload.host_memory_gib",
            f"{offload.host_memory_gib:g} GiB for each rank",
            f"at least {size(need.certain)}: state {size(need.state)}, buffers {size(need.buffers)}",
            "a larger optimizer.offload.host_memory_gib, or " + way_out(offload, config.train.precision, uses_gpu),
            needed=need.certain,
            limit=limit,
        )


def way_out(offload: OffloadConfig, precision: str, uses_gpu: bool) -> str:
    """What makes the need of a host smaller."""
    ways = ["a larger optimizer.offload.resident_fraction (state on the device)"] if uses_gpu else []
    if precision == "bf16" and offload.master == "full":
        ways.append("optimizer.offload.master=low_bits (2 bytes for each parameter less)")
    return ", or ".join([*ways, "more ranks or nodes"])
