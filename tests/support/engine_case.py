"""A small model and its data for engine tests, on any DeepSpeed layout and in plain torch.

Samples hold unequal numbers of targets, so that micro-batches and ranks do too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import Save
from pretrain.config.schema import (
    Config,
    DeepSpeedConfig,
    LocalConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from pretrain.parallel.process import gather_objects

GLOBAL_BATCH = 8
LENGTH = 5
NUM_STEPS = 8


@dataclass(frozen=True)
class Case:
    """An engine's layout. The threshold of 20 elements leaves the small parameters whole at stage 3, and no others."""

    stage: int = 0
    size: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap: bool = False
    precision: str = "fp32"
    clip: float | None = 0.5
    activation_checkpointing: str = "none"
    sub_group_size: int | None = None
    threshold: int = 20
    muon: bool = False

    @property
    def micro_batch(self) -> int:
        """Rows, such that every rank has two micro-batches a step."""
        return GLOBAL_BATCH // (2 * self.size)

    def config(self) -> Config:
        extra: dict[str, Any] = {}
        if self.stage:
            extra |= {"reduce_bucket_size": 150} if self.has_buckets else {}
        if self.stage == 3:
            extra |= {"persistence_threshold": self.threshold, "prefetch_bucket_size": 100}
        if self.sub_group_size:
            extra["pass_through"] = {"zero_optimization": {"sub_group_size": self.sub_group_size}}
        return Config(
            train=TrainConfig(
                steps=NUM_STEPS,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=self.micro_batch,
                precision=self.precision,  # type: ignore[arg-type]
                clip_grad_norm=self.clip,
                activation_checkpointing=self.activation_checkpointing,  # type: ignore[arg-type]
            ),
            optimizer=(MuonConfig if self.muon else OptimizerConfig)(
                learning_rate=1e-2, weight_decay=0.1, schedule=ScheduleConfig(kind="constant", horizon=NUM_STEPS)
            ),
            engine=DeepSpeedConfig(
                zero_stage=self.stage,
                offload_optimizer=self.offload_optimizer,
                offload_parameters=self.offload_parameters,
                overlap_comm=self.overlap,
                **extra,
            ),
            launcher=LocalConfig(num_processes=self.size),
        )

    @property
    def has_buckets(self) -> bool:
        return not (self.stage == 1 and self.precision == "bf16" and not self.offload_optimizer)


class PackedNet(nn.Module):
    """Embedding, a packed projection, vectors, two layers that can be checkpointed, a frozen parameter, a buffer.

    The packed projection has 7 + 8 rows, so that shards cut through components; no parameter's size divides by 4, so
    that pieces are padded. ``tied`` takes the embedding as the head.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(11, 6)
        self.packed = nn.Linear(6, 15)
        self.packed.canonical_components = {"weight": {"a": 7, "b": 8}, "bias": {"a": 7, "b": 8}}  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.ones(15))
        self.blocks = nn.ModuleList(Layer(15, 7) for _ in range(2))
        self.out = nn.Linear(15, 6)
        self.head = None if tied else nn.Linear(6, 11, bias=False)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("statistic", torch.arange(3.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.packed(self.embedding(tokens))) * self.scale
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.activation_checkpointing else block(x)
        x = self.out(x) + self.frozen
        return linear(x, self.embedding.weight) if self.head is None else self.head(x)


class Layer(nn.Module):
    """Residual layer that uses one of its child's parameters without calling the child, as fused layers do."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        return x + linear(torch.tanh(self.up(x)), self.down.weight)


@dataclass
class Output:
    loss_sum: torch.Tensor
    metrics: dict[str, torch.Tensor]


def loss_function(model: Any, batch: dict[str, torch.Tensor]) -> Output:
    logits = model(batch["tokens"])
    losses = cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")
    return Output((losses * batch["mask"].flatten()).sum(), {"targets": batch["mask"].sum().float()})


def samples(step: int) -> dict[str, torch.Tensor]:
    """One global batch; row r has between 1 and LENGTH targets."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (GLOBAL_BATCH, LENGTH)
    batch = {name: torch.randint(11, shape, generator=generator) for name in ("tokens", "targets")}
    lengths = torch.randint(1, LENGTH + 1, (GLOBAL_BATCH, 1), generator=generator)
    return batch | {"mask": torch.arange(LENGTH).expand(shape) < lengths}


def rate(step: int) -> float:
    return 1e-2 * (1 - step / (2 * NUM_STEPS))


def build(case: Case, tied: bool = False) -> Any:
    from pretrain.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(PackedNet(tied), case.config(), torch.device("cpu"))


def run_steps(engine: Any, rank: int, case: Case, steps: range) -> list[tuple[float, float]]:
    """Train ``steps``; returns (this rank's loss sum, global gradient norm) of each."""
    results = []
    for step in steps:
        batch = samples(step)
        micro = case.micro_batch
        starts = range(micro * rank, GLOBAL_BATCH, micro * case.size)
        batches = [{name: value[start : start + micro] for name, value in batch.items()} for start in starts]
        result = engine.train_step(batches, loss_function, float(batch["mask"].sum()), rate(step))
        assert result.metrics["targets"] == sum(float(part["mask"].sum()) for part in batches)
        results.append((result.loss_sum, result.grad_norm))
    return results


def save(engine: Any, root: Path, step: int, rank: int) -> Path:
    save = Save(CheckpointStore(root), step=step, attempt=1, rank=rank, gather=gather_objects, fence=lambda: None)
    return save.write(engine.export_state(), {"step": step, "optimizer_scalars": engine.scalar_state()}).path


def state_of(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {f"{slot}:{name}": reader.tensor(name, slot) for slot in reader.slots() for name in reader.names(slot)}


@dataclass(frozen=True)
class Trajectory:
    """Loss sums and gradient norms by step, and the trained parameters by module name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def torch_reference(clip: float | None = 0.5, tied: bool = False, muon: bool = False) -> Trajectory:
    """The same training in plain torch, one process, one batch a step, FP32."""
    from pretrain.optim.build import build_optimizer

    model = PackedNet(tied)
    optimizer = build_optimizer(model, Case(muon=muon).config().optimizer)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        batch = samples(step)
        output = loss_function(model, batch)
        (output.loss_sum / batch["mask"].sum()).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
        losses.append(float(output.loss_sum.detach()))
    return Trajectory(losses, norms, {name: value.detach() for name, value in model.named_parameters()})


def joined(results: list[list[tuple[float, float]]]) -> Trajectory:
    """Results of :func:`run_steps` on all ranks, whose gradient norms must agree."""
    norms = [norm for _, norm in results[0]]
    for rank in results:
        assert [norm for _, norm in rank] == norms
    return Trajectory([sum(rank[step][0] for rank in results) for step in range(len(norms))], norms)
