"""An objective that makes things go wrong, for tests of what happens then: a component from outside the package.

Put this folder on ``run.import_paths`` and choose ``objective={_target_: faulty.FaultyConfig, faults: [...]}``.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.objectives.next_token import NextTokenObjective
from pretrain.objectives.protocol import LossOutput


@dataclass(frozen=True, kw_only=True)
class FaultyConfig:
    """``faults``: mappings of ``kind``, ``rank``, ``step`` (as counted by users, from 1) and ``once``, a file that is
    made when the fault happens and that keeps it from happening again (absent: it happens each time).
    ``global_batch``: sequences of a step. ``pace_s``: seconds that every call takes at least."""

    global_batch: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    pace_s: float = 0.0

    def build(self) -> FaultyObjective:
        return FaultyObjective(self)


class FaultyObjective(NextTokenObjective):
    """Next-token prediction that fails where it is told to."""

    def __init__(self, config: FaultyConfig) -> None:
        super().__init__()
        self.config = config
        self.rank = int(os.environ["SLURM_PROCID"])
        self.faults = [dict(fault) for fault in config.faults]
        for fault in self.faults:
            if fault["kind"] == "lonely_collective":
                fault["group"] = torch.distributed.new_group()

    def __call__(self, model: Callable[..., Tensor], batch: Mapping[str, Tensor]) -> LossOutput:
        step = int(batch["sample_ids"][0]) // self.config.global_batch + 1
        output = super().__call__(model, batch)
        if not torch.is_grad_enabled():
            return output
        time.sleep(self.config.pace_s)
        for fault in self.faults:
            if fault["step"] == step and fault.get("rank", self.rank) == self.rank and _is_due(fault):
                output = FAULTS[fault["kind"]](output, fault)
        return output


def _is_due(fault: Mapping[str, Any]) -> bool:
    if "once" not in fault:
        return True
    marker = Path(f"{fault['once']}.{os.environ['SLURM_PROCID']}")
    if marker.exists():
        return False
    marker.touch()
    return True


def _kill(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    os.kill(os.getpid(), signal.SIGKILL)
    return output


def _raise(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    raise RuntimeError("a fault that was asked for")


def _spin(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    while True:
        pass


def _lonely_collective(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    """Join a collective that no other rank ever joins, in a group of its own, so that no other one is met by chance."""
    torch.distributed.all_reduce(torch.ones(3), group=fault["group"])
    return output


def _device_memory(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _host_memory(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    """A real failure of torch's allocator: the address space is limited to little more than is used."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    torch.empty(2**36)
    return output


def _not_a_number(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    return LossOutput(output.loss_sum * float("nan"), output.metrics)


def _spike(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    return LossOutput(output.loss_sum * 50.0, output.metrics)


def _hold(output: LossOutput, fault: Mapping[str, Any]) -> LossOutput:
    """Wait for the file ``until``."""
    while not Path(fault["until"]).exists():
        time.sleep(0.02)
    return output


FAULTS: dict[str, Callable[[LossOutput, Mapping[str, Any]], LossOutput]] = {
    "kill": _kill,
    "raise": _raise,
    "spin": _spin,
    "lonely_collective": _lonely_collective,
    "device_memory": _device_memory,
    "host_memory": _host_memory,
    "not_a_number": _not_a_number,
    "spike": _spike,
    "hold": _hold,
}
