"""The process contract: srun's variables in, one clear error when they are wrong."""

from __future__ import annotations

import pytest
import torch

from pretrain.parallel.process import ProcessEnvironment, ProcessEnvironmentError, select_device

GOOD = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "PRETRAIN_ATTEMPT": "7",
}


def test_reads_what_srun_gives() -> None:
    assert ProcessEnvironment.read(GOOD) == ProcessEnvironment(3, 4, 1, 1, 2, "node1", 29500, 7)


def test_all_faults_are_named_together() -> None:
    broken = {name: value for name, value in GOOD.items() if name != "MASTER_ADDR"} | {"SLURM_NTASKS": "two"}
    del broken["SLURM_LOCALID"]
    with pytest.raises(ProcessEnvironmentError) as caught:
        ProcessEnvironment.read(broken)
    for fault in ("MASTER_ADDR is not set", "SLURM_LOCALID is not set", "SLURM_NTASKS is 'two'", "pretrain run"):
        assert fault in str(caught.value)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ProcessEnvironmentError, match="SLURM_PROCID 4 is outside"):
        ProcessEnvironment.read(GOOD | {"SLURM_PROCID": "4"})


def test_cuda_is_never_silently_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ProcessEnvironmentError, match=r"launcher\.device=cpu"):
        select_device("cuda", 0)
