"""Parameters that stay in FP32 when the rest trains in bf16: what the forward pass reads, on every engine and stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_case import (
    Case,
    build,
    differing,
    resume_and_save,
    rows_of,
    run_steps,
    samples,
    save,
    state_of,
    train_and_save,
)
from support.offload_lm_case import OffloadCase
from torch import Tensor

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig, OffloadConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.canonical import canonical_parameters

pytestmark = pytest.mark.distributed

_OFFLOAD = OffloadConfig(enabled=True, fraction=0.5, subgroup_size=400, master="low_bits")
KEPT = ("A_log", "D", "dt_bias")
LAYOUTS = {
    "zero1": Case(DeepSpeedConfig(zero_stage=1), 2, "mamba", precision="bf16"),
    "zero1 offloaded": Case(DeepSpeedConfig(zero_stage=1, offload_optimizer=True), 2, "mamba", precision="bf16"),
    "zero2": Case(DeepSpeedConfig(zero_stage=2), 2, "mamba", precision="bf16"),
    "zero3": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=0), 2, "mamba", precision="bf16"),
    "zero1 states offloaded": OffloadCase(DeepSpeedConfig(zero_stage=1), 2, "mamba", precision="bf16"),
    "zero3 states offloaded": OffloadCase(
        DeepSpeedConfig(zero_stage=3, persistence_threshold=0),
        2,
        "mamba",
        precision="bf16",
        offload=OffloadConfig(enabled=True, subgroup_size=333, fraction=0.4, master="low_bits"),
    ),
    "dp2": Case(MegatronConfig(distributed_optimizer=False), 2, "mamba", precision="bf16"),
    "dp2 distributed optimizer": Case(MegatronConfig(), 2, "mamba", precision="bf16"),
    "tp2": Case(MegatronConfig(tensor_parallel=2), 2, "mamba", precision="bf16"),
    "dp2 states offloaded": OffloadCase(MegatronConfig(), 2, "mamba", precision="bf16", offload=_OFFLOAD),
    "tp2 states offloaded": OffloadCase(
        MegatronConfig(tensor_parallel=2), 2, "mamba", precision="bf16", offload=_OFFLOAD
    ),
}


def read_in_forward(engine: Any) -> dict[str, Tensor]:
    """What the scan of each mixer was given in a forward pass, by canonical name of the parameter."""
    read: dict[str, Tensor] = {}
    chunks = [chunk.module.module for chunk in engine._chunks] if hasattr(engine, "_chunks") else [engine._model]
    handles = []
    for module in chunks:
        for p in canonical_parameters(module):
            name = p.module_name.rpartition(".")
            if name[2] in KEPT:

                def hook(owner: Any, *_: Any, p: Any = p, attribute: str = name[2]) -> None:
                    read[p.parts[0].name] = getattr(owner, attribute).detach().clone()

                handles.append(module.get_submodule(name[0]).register_forward_hook(hook))
    engine.eval_step(rows_of(samples(50), 0, 2), NextTokenConfig().build())
    for handle in handles:
        handle.remove()
    return read


def train_and_read(rank: int, size: int, case: Case, root: Path, checkpoint: Path | None) -> dict[str, Tensor]:
    engine = build(case)
    if checkpoint is not None:
        engine.import_state(CheckpointReader(checkpoint))
    else:
        run_steps(engine, case, range(2))
    values = read_in_forward(engine)
    save(engine, root, 2, rank)
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_forward_pass_reads_the_masters(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = LAYOUTS[layout]
    pool = worker_pools(case.size, case.pool)
    ranks = pool.run(train_and_read, case, tmp_path / "trained", None)
    path = tmp_path / "trained/step_00000002"
    again = pool.run(train_and_read, case, tmp_path / "resumed", path)
    state = state_of(path)
    assert not differing(state, state_of(tmp_path / "resumed/step_00000002"))
    split = case.size if layout.startswith("tp") else 1
    for results in (ranks, again):
        for rank, values in enumerate(results):
            assert {name.rpartition(".")[2] for name in values} == set(KEPT)
            for name, value in values.items():
                master = state[f"master:{name}"].chunk(split)[rank % split]
                assert value.dtype == torch.float32
                assert torch.equal(value, master)
    rounded = [
        name for name in ranks[0] if torch.equal(state[f"master:{name}"], state[f"master:{name}"].bfloat16().float())
    ]
    assert len(rounded) < len(ranks[0]) / 2  # or there was nothing to tell apart


@pytest.mark.parametrize(
    "layout", ["zero1", "zero3", "zero3 states offloaded", "dp2 distributed optimizer", "dp2 states offloaded"]
)
def test_training_resumes_bit_for_bit(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = LAYOUTS[layout]
    pool = worker_pools(case.size, case.pool)
    whole = pool.run(train_and_save, case, tmp_path / "whole", 4)
    pool.run(train_and_save, case, tmp_path / "part", 2)
    parts = pool.run(resume_and_save, case, tmp_path / "part/step_00000002", tmp_path / "resumed", 2, 4)
    assert parts == [rank[2:] for rank in whole]
    assert not differing(state_of(tmp_path / "whole/step_00000004"), state_of(tmp_path / "resumed/step_00000004"))
