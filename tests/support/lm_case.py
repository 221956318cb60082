"""A tiny language model and its data, trained on any engine and layout, and in plain torch.

Rows hold packed documents, padding and unequal numbers of targets, so that micro-batches and ranks do too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.hybrid import hybrid
from support.logical import logical_tensors
from torch import nn

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save
from pretrain.config.schema import (
    Config,
    EngineConfig,
    LocalConfig,
    MegatronConfig,
    MuonConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from pretrain.models.hybrid.config import HybridConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.optim.build import build_optimizer
from pretrain.parallel.layers import TorchLayers
from pretrain.parallel.process import all_reduce_floats, gather_objects

VOCABULARY = 64
GLOBAL_BATCH = 8
LENGTH = 32
PATTERNS = {"hybrid": "M-*-M-*-", "attention": "*-*-*-*-", "mamba": "MMMM"}


@dataclass(frozen=True)
class Case:
    """One layout of one model. ``size`` counts processes."""

    engine: EngineConfig
    size: int
    model: str = "hybrid"
    tied: bool = True
    micro_batch: int = 2
    precision: str = "fp32"
    clip: float | None = 0.5
    z_loss: float = 0.0
    activation_checkpointing: str = "none"
    model_config: HybridConfig | None = None
    muon: bool = False

    def config(self) -> Config:
        return Config(
            run=RunConfig(seed=5),
            train=TrainConfig(
                steps=100,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=self.micro_batch,
                precision=self.precision,  # type: ignore[arg-type]
                clip_grad_norm=self.clip,
                activation_checkpointing=self.activation_checkpointing,  # type: ignore[arg-type]
            ),
            model=self.model_config
            or hybrid(
                pattern=PATTERNS[self.model],
                width=32,
                vocab_size=VOCABULARY,
                attention__num_heads=4,
                attention__num_kv_heads=4,
                attention__rope_theta=10000.0,
                mamba2__head_dim=16,
                mamba2__state_dim=8,
                mamba2__groups=4,
                mamba2__chunk_size=16,
                mlp__ratio=2.0,
                tied_embeddings=self.tied,
            ),
            optimizer=(MuonConfig if self.muon else OptimizerConfig)(
                learning_rate=2e-3, weight_decay=0.1, schedule=ScheduleConfig(kind="constant", horizon=100)
            ),
            engine=self.engine,
            launcher=LocalConfig(num_processes=self.size),
        )

    @property
    def pool(self) -> str:
        """Megatron's CPU layer changes its modules in place: its processes run nothing else."""
        return "megatron" if isinstance(self.engine, MegatronConfig) else ""


def samples(step: int) -> dict[str, torch.Tensor]:
    """One global batch: two documents a row, padding at the end of some rows, targets left out at random."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (GLOBAL_BATCH, LENGTH)
    tokens, targets = (torch.randint(VOCABULARY, shape, generator=generator).int() for _ in range(2))
    border = torch.randint(1, LENGTH - 8, (GLOBAL_BATCH, 1), generator=generator)
    end = torch.randint(LENGTH - 7, LENGTH + 1, (GLOBAL_BATCH, 1), generator=generator)
    place = torch.arange(LENGTH).expand(shape)
    segments = (place >= border).int().masked_fill(place >= end, -1)
    positions = torch.where(segments == 1, place - border, place).int()
    mask = (torch.rand(shape, generator=generator) > 0.3) & (segments >= 0)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": mask,
        "seq_idx": segments,
        "position_ids": positions,
    }


def rate(step: int) -> float:
    return 2e-3 * (1 - step / 200)


def rows_of(batch: dict[str, torch.Tensor], start: int, count: int) -> dict[str, torch.Tensor]:
    return {name: value[start : start + count] for name, value in batch.items()}


def build(case: Case) -> Any:
    from pretrain.engines.build import build_engine

    return build_engine(case.config(), torch.device("cpu"))


def run_steps(engine: Any, case: Case, steps: range) -> list[tuple[float, float]]:
    """Train ``steps``; returns (mean loss over the global batch, global gradient norm) of each."""
    objective = NextTokenConfig(z_loss=case.z_loss).build()
    results = []
    for step in steps:
        batch = samples(step)
        targets = float(batch["loss_mask"].sum())
        starts = range(case.micro_batch * engine.dp_rank, GLOBAL_BATCH, case.micro_batch * engine.dp_size)
        micro = [rows_of(batch, start, case.micro_batch) for start in starts]
        result = engine.train_step(micro, objective, targets, rate(step))
        results.append((all_reduce_floats([result.loss_sum])[0] / targets, result.grad_norm))
    return results


def save(engine: Any, root: Path, step: int, rank: int) -> Path:
    save = Save(CheckpointStore(root), step=step, attempt=1, rank=rank, gather=gather_objects, fence=lambda: None)
    return save.write(engine.export_state(), {"step": step, "optimizer_scalars": engine.scalar_state()}).path


def state_of(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {f"{slot}:{name}": reader.tensor(name, slot) for slot in reader.slots() for name in reader.names(slot)}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names that differ in any bit, or exist on one side only."""
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))


def train_and_save(rank: int, size: int, case: Case, root: Path | None, num_steps: int) -> list[tuple[float, float]]:
    engine = build(case)
    results = run_steps(engine, case, range(num_steps))
    if root is not None:
        save(engine, root, num_steps, rank)
    return results


def resume_and_save(
    rank: int, size: int, case: Case, checkpoint: Path, root: Path, first: int, num_steps: int
) -> list[tuple[float, float]]:
    """Take over ``checkpoint`` in a fresh engine, save it at once as step 0, train on, save."""
    engine = build(case)
    engine.import_state(CheckpointReader(checkpoint))
    save(engine, root, 0, rank)
    results = run_steps(engine, case, range(first, num_steps))
    save(engine, root, num_steps, rank)
    return results


@dataclass(frozen=True)
class Reference:
    """Plain torch: mean losses, gradient norms, and the final logical tensors by name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    evaluation: float


def torch_reference(case: Case, num_steps: int) -> Reference:
    """The same training in one process with one plain loop: no engine, no parallel layers."""
    config = case.config()
    model = config.model.build(TorchLayers())
    model.reset_parameters(config.run.seed)
    optimizer = build_optimizer(model, config.optimizer)
    objective = NextTokenConfig(z_loss=case.z_loss).build()
    losses, norms = [], []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        batch = samples(step)
        targets = float(batch["loss_mask"].sum())
        total = 0.0
        for start in range(0, GLOBAL_BATCH, 2):
            loss = objective(model, rows_of(batch, start, 2)).loss_sum
            (loss / targets).backward()
            total += float(loss.detach())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), case.clip or float("inf"))))
        optimizer.step()
        losses.append(total / targets)
    with torch.no_grad():
        evaluation = float(objective(model, rows_of(samples(99), 0, 2)).loss_sum)
    return Reference(losses, norms, {n: v.clone() for n, v in logical_tensors(model).items()}, evaluation)
