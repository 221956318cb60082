"""Process contract: what one rank learns from its environment, and the process group it joins.

Every launcher starts one process per rank with the variables that Slurm's ``srun`` sets, so that a rank cannot tell
a workstation from a cluster:

=====================  ==========================================================
``SLURM_PROCID``       global rank, 0 .. world size - 1
``SLURM_NTASKS``       world size
``SLURM_LOCALID``      rank on this node
``SLURM_NODEID``       node number
``SLURM_NNODES``       number of nodes
``MASTER_ADDR``        address of rank 0's node
``MASTER_PORT``        free TCP port on that node
``PRETRAIN_ATTEMPT``   attempt number of the run directory's lease
=====================  ==========================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_INTEGERS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "MASTER_PORT")


class ProcessEnvironmentError(ValueError):
    """The environment does not describe a rank."""


@dataclass(frozen=True)
class ProcessEnvironment:
    """Place of this process among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    num_nodes: int
    master_address: str
    master_port: int
    attempt: int

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None) -> ProcessEnvironment:
        """Read the contract's variables.

        Raises:
            ProcessEnvironmentError: naming every missing or non-integer variable at once.
        """
        env = os.environ if env is None else env
        faults = []
        values: dict[str, int] = {}
        for name in _INTEGERS:
            text = env.get(name)
            if text is None:
                faults.append(f"{name} is not set")
            elif not text.lstrip("-").isdigit():
                faults.append(f"{name} is {text!r}, expected an integer")
            else:
                values[name] = int(text)
        if "MASTER_ADDR" not in env:
            faults.append("MASTER_ADDR is not set")
        if not faults and not 0 <= values["SLURM_PROCID"] < values["SLURM_NTASKS"]:
            faults.append(f"SLURM_PROCID {values['SLURM_PROCID']} is outside 0..{values['SLURM_NTASKS'] - 1}")
        if faults:
            raise ProcessEnvironmentError(
                "This process was not started as a rank: "
                + "; ".join(faults)
                + ". Start training with `pretrain run` (or one `srun` task per rank), not by calling the entry."
            )
        return cls(
            rank=values["SLURM_PROCID"],
            world_size=values["SLURM_NTASKS"],
            local_rank=values["SLURM_LOCALID"],
            node_rank=values["SLURM_NODEID"],
            num_nodes=values["SLURM_NNODES"],
            master_address=env["MASTER_ADDR"],
            master_port=values["MASTER_PORT"],
            attempt=int(env.get("PRETRAIN_ATTEMPT", "0")),
        )


def select_device(choice: str, local_rank: int) -> torch.device:
    """Device of this rank for ``launcher.device`` (auto, cpu or cuda).

    Raises:
        ProcessEnvironmentError: CUDA was asked for and this host offers none.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ProcessEnvironmentError(
            "launcher.device is cuda but torch sees no CUDA device on this host; "
            "set launcher.device=cpu, or install a CUDA build of torch and check the driver (`pretrain doctor`)."
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def join_process_group(
    env: ProcessEnvironment, device: torch.device, timeout: timedelta = timedelta(minutes=30)
) -> None:
    """Join the default process group: NCCL for CUDA tensors with gloo for host tensors, gloo alone on CPU.

    Also sets RANK, WORLD_SIZE and LOCAL_RANK, which DeepSpeed reads.
    """
    os.environ.update(
        RANK=str(env.rank),
        WORLD_SIZE=str(env.world_size),
        LOCAL_RANK=str(env.local_rank),
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{env.master_address}:{env.master_port}",
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )


def world_size() -> int:
    """Number of ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_floats(values: list[float]) -> list[float]:
    """Sum host numbers over all ranks in float64, on the host back end; returns the sums in the same order."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return list(tensor.tolist())


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value (picklable), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
