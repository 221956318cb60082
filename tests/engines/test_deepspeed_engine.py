"""DeepSpeed engine: same training as plain torch on any stage and layout, canonical state both ways."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config.schema import Config, EngineConfig, OptimizerConfig, ScheduleConfig, TrainConfig

pytestmark = pytest.mark.distributed

RATES = [1e-2, 8e-3, 6e-3, 4e-3]
GLOBAL_BATCH = 8


class PackedNet(nn.Module):
    """Embedding, a packed projection (7 + 9 rows, so that shards cut through components), norm-like vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 6)
        self.packed = nn.Linear(6, 16)
        self.packed.canonical_components = {"weight": {"a": 7, "b": 9}, "bias": {"a": 7, "b": 9}}  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 11, bias=False)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("statistic", torch.arange(3.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.packed(self.embedding(tokens))) * self.scale)


@dataclasses.dataclass
class Output:
    loss_sum: torch.Tensor
    metrics: dict[str, torch.Tensor]


def loss_function(model: Any, batch: dict[str, torch.Tensor]) -> Output:
    logits = model(batch["tokens"])
    loss = cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="sum")
    return Output(loss, {"count": torch.tensor(float(batch["tokens"].shape[0]))})


def samples(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shape = (GLOBAL_BATCH, 5)
    return {name: torch.randint(11, shape, generator=generator) for name in ("tokens", "targets")}


def config(stage: int, micro_batch: int, precision: str = "fp32", clip: float | None = 0.5) -> Config:
    return Config(
        train=TrainConfig(
            steps=4,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch,
            precision=precision,  # type: ignore[arg-type]
            clip_grad_norm=clip,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, weight_decay=0.1, schedule=ScheduleConfig(kind="constant", horizon=4)
        ),
        engine=EngineConfig(zero_stage=stage),
    )


def build(rank: int, size: int, stage: int, precision: str = "fp32", clip: float | None = 0.5) -> Any:
    from pretrain.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(PackedNet(), config(stage, 2, precision, clip), torch.device("cpu"))


def run_steps(engine: Any, rank: int, size: int, steps: range) -> list[tuple[float, float]]:
    """Train ``steps``; returns (this rank's loss sum, global gradient norm) of each."""
    results = []
    for step in steps:
        batch = samples(step)
        starts = range(2 * rank, GLOBAL_BATCH, 2 * size)
        micro = [{name: value[start : start + 2] for name, value in batch.items()} for start in starts]
        result = engine.train_step(micro, loss_function, float(GLOBAL_BATCH * 5), RATES[step])
        results.append((result.loss_sum, result.grad_norm))
    return results


def save(engine: Any, root: Path, step: int, rank: int) -> Path:
    from pretrain.parallel.process import gather_objects

    return save_checkpoint(
        CheckpointStore(root),
        list(engine.export_state()),
        {"step": step, "optimizer_scalars": engine.scalar_state()},
        step=step,
        attempt=1,
        rank=rank,
        gather=gather_objects,
        fence=lambda: None,
    )


def state_of(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return {f"{slot}:{name}": reader.tensor(name, slot) for slot in reader.slots() for name in reader.names(slot)}


def train_and_save(rank: int, size: int, root: Path, stage: int, precision: str, clip: float | None) -> Any:
    engine = build(rank, size, stage, precision, clip)
    results = run_steps(engine, rank, size, range(4))
    save(engine, root, 4, rank)
    return results


def train_in_two_parts(
    rank: int, size: int, root: Path, first_stage: int, second_stage: int, precision: str
) -> list[tuple[float, float]]:
    engine = build(rank, size, first_stage, precision)
    run_steps(engine, rank, size, range(2))
    path = save(engine, root, 2, rank)
    torch.manual_seed(99)
    engine = build(rank, size, second_stage, precision)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(1.0)  # whatever the fresh engine held must be overwritten
    engine.import_state(CheckpointReader(path))
    results = run_steps(engine, rank, size, range(2, 4))
    save(engine, root, 4, rank)
    return results


def torch_reference(clip: float | None) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same training in plain torch, one process, float32."""
    from pretrain.optim.build import build_optimizer

    model = PackedNet()
    optimizer = build_optimizer(model, config(0, 2).optimizer)
    losses, norms = [], []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.zero_grad()
        output = loss_function(model, samples(step))
        (output.loss_sum / (GLOBAL_BATCH * 5)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
        losses.append(float(output.loss_sum.detach()))
        norms.append(float(norm))
    return losses, norms, {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("stage", "clip"), [(0, 0.5), (1, 0.5), (2, 0.5), (0, None), (1, None)])
def test_trains_like_plain_torch(worker_pools: Any, tmp_path: Path, size: int, stage: int, clip: float | None) -> None:
    results = worker_pools(size).run(train_and_save, tmp_path, stage, "fp32", clip)
    losses, norms, weights = torch_reference(clip)
    summed = [sum(rank[step][0] for rank in results) for step in range(4)]
    assert summed == pytest.approx(losses, rel=1e-5)
    for rank in results:
        assert [norm for _, norm in rank] == pytest.approx(norms, rel=1e-4)
    stored = state_of(CheckpointReader(tmp_path / "step_00000004"))
    torch.testing.assert_close(stored["master:embedding.weight"], weights["embedding.weight"], rtol=1e-4, atol=1e-6)
    packed = torch.cat([stored["master:packed.a.weight"], stored["master:packed.b.weight"]])
    torch.testing.assert_close(packed, weights["packed.weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored["weight:frozen"], weights["frozen"], rtol=0, atol=0)
    assert torch.equal(stored["buffer:statistic"], torch.arange(3.0))
    assert {"exp_avg:packed.b.bias", "exp_avg_sq:scale"} <= stored.keys()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_same_layout_resumes_bit_for_bit(worker_pools: Any, tmp_path: Path, stage: int, precision: str) -> None:
    pool = worker_pools(2)
    whole = pool.run(train_and_save, tmp_path / "whole", stage, precision, 0.5)
    parts = pool.run(train_in_two_parts, tmp_path / "parts", stage, stage, precision)
    assert [rank[2:] for rank in whole] == parts
    expected = state_of(CheckpointReader(tmp_path / "whole/step_00000004"))
    found = state_of(CheckpointReader(tmp_path / "parts/step_00000004"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def load_and_save(rank: int, size: int, path: Path, root: Path, stage: int) -> None:
    engine = build(rank, size, stage)
    engine.import_state(CheckpointReader(path))
    save(engine, root, 4, rank)


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_state_survives_a_change_of_layout_unaltered(worker_pools: Any, tmp_path: Path, size: int, stage: int) -> None:
    worker_pools(2).run(train_and_save, tmp_path / "from", 1, "fp32", 0.5)
    source = tmp_path / "from/step_00000004"
    worker_pools(size).run(load_and_save, source, tmp_path / "to", stage)
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "to/step_00000004")
    assert after.training["optimizer_scalars"] == {"step": 4.0}
    expected, found = state_of(before), state_of(after)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


READ_WITHOUT_ENGINE = """
import sys
import torch
from test_deepspeed_engine import PackedNet
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pathlib import Path

model = PackedNet()
load_weights(model, CheckpointReader(Path(sys.argv[1])))
assert "deepspeed" not in sys.modules
torch.save(model.state_dict(), sys.argv[2])
"""


def weights_in_training(rank: int, size: int, root: Path) -> dict[str, torch.Tensor]:
    engine = build(rank, size, 1)
    run_steps(engine, rank, size, range(4))
    save(engine, root, 4, rank)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def test_one_process_reads_it_without_deepspeed_bit_for_bit(worker_pools: Any, tmp_path: Path) -> None:
    expected = worker_pools(2).run(weights_in_training, tmp_path)[0]
    command = [sys.executable, "-c", READ_WITHOUT_ENGINE, tmp_path / "step_00000004", tmp_path / "weights.pt"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    found = torch.load(tmp_path / "weights.pt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_another_model_is_refused_with_every_difference(worker_pools: Any, tmp_path: Path) -> None:
    worker_pools(1).run(train_and_save, tmp_path, 1, "fp32", 0.5)
    other = PackedNet()
    other.head = nn.Linear(16, 12, bias=False)
    other.extra = nn.Parameter(torch.zeros(2))
    del other.scale
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, CheckpointReader(tmp_path / "step_00000004"))
    text = str(caught.value)
    assert "extra: missing in the checkpoint" in text
    assert "scale: not in the model" in text
    assert "head.weight: shape [11, 16] in the checkpoint, [12, 16] in the model" in text


def masters_before_training(rank: int, size: int, root: Path) -> None:
    save(build(rank, size, 1, "bf16"), root, 0, rank)


def test_bf16_masters_start_from_full_precision(worker_pools: Any, tmp_path: Path) -> None:
    worker_pools(2).run(masters_before_training, tmp_path)
    stored = CheckpointReader(tmp_path / "step_00000000").tensor("embedding.weight", "master")
    assert torch.equal(stored, PackedNet().embedding.weight.detach())
