"""DeepSpeed engine: DeepSpeed's own parts at work on padded, frozen and packed parameters; canonical state both ways.

Every stage, offload and number of ranks trains the language models in ``test_deepspeed_models.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_case import (
    NUM_STEPS,
    Case,
    PackedNet,
    build,
    joined,
    loss_function,
    run_steps,
    samples,
    save,
    state_of,
    torch_reference,
)
from support.matrix import rotating
from torch import nn

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.reader import CheckpointReader, load_weights

pytestmark = pytest.mark.distributed

OFFLOADS = {"none": (False, False), "optimizer": (True, False), "parameters": (False, True), "both": (True, True)}
POSSIBLE_OFFLOADS = {0: ["none"], 1: ["none", "optimizer"], 2: ["none", "optimizer"], 3: list(OFFLOADS)}
OPTIMIZER_CLASS = {
    0: "AdamW",
    1: "DeepSpeedZeroOptimizer",
    2: "DeepSpeedZeroOptimizer",
    3: "DeepSpeedZeroOptimizer_Stage3",
}


def layouts(offloads: dict[int, list[str]]) -> list[tuple[int, str, int]]:
    """Every (stage, offload, size)."""
    return [(stage, offload, size) for stage in range(4) for offload in offloads[stage] for size in (1, 2, 4)]


def case_of(stage: int, offload: str, size: int, **more: Any) -> Case:
    optimizer, parameters = OFFLOADS[offload]
    return Case(stage, size, offload_optimizer=optimizer, offload_parameters=parameters, **more)


def train(rank: int, size: int, case: Case, root: Path | None, tied: bool = False) -> dict[str, Any]:
    engine = build(case, tied)
    results = run_steps(engine, rank, case, range(NUM_STEPS))
    if root is not None:
        save(engine, root, NUM_STEPS, rank)
    layers = [module for module in engine._engine.module.modules() if hasattr(module, "num_forwards")]
    num_forwards = sum(layer.num_forwards for layer in layers)
    # Before evaluation, after which DeepSpeed leaves gathered what the next step is going to use.
    largest_held = max(parameter.numel() for parameter in engine._engine.module.parameters())
    return {
        "results": results,
        "optimizer": type(engine._engine.optimizer).__name__,
        "has_module": engine.module is not None,
        "evaluated": engine.eval_step(samples(0), loss_function).loss_sum,
        "largest_held": largest_held,
        "num_forwards": num_forwards,
    }


TRAJECTORIES = [
    (*layout, overlap)
    for layout, overlap in product(layouts(POSSIBLE_OFFLOADS), (False, True))
    if not (layout[0] == 0 and overlap)
]


# One of each class of optimizer, with and without overlap; pieces are padded where there are several ranks.
MUST_TRAIN = [(0, "none", 2, False), (1, "none", 4, True), (2, "optimizer", 2, False), (3, "both", 2, True)]


@pytest.mark.parametrize(("stage", "offload", "size", "overlap"), rotating(TRAJECTORIES, 4, MUST_TRAIN))
def test_uneven_frozen_and_packed_parameters_train_like_plain_torch(
    worker_pools: Any, tmp_path: Path, stage: int, offload: str, size: int, overlap: bool
) -> None:
    ranks = worker_pools(size).run(train, case_of(stage, offload, size, overlap=overlap), tmp_path)
    found, reference = joined([rank["results"] for rank in ranks]), torch_reference()
    assert found.losses == pytest.approx(reference.losses, rel=2e-6)
    assert found.norms == pytest.approx(reference.norms, rel=2e-5)
    stored = state_of(tmp_path / f"step_{NUM_STEPS:08}")
    weights = reference.weights
    torch.testing.assert_close(stored["master:embedding.weight"], weights["embedding.weight"], rtol=1e-4, atol=2e-6)
    packed = torch.cat([stored["master:packed.a.weight"], stored["master:packed.b.weight"]])
    torch.testing.assert_close(packed, weights["packed.weight"], rtol=1e-4, atol=2e-6)
    assert torch.equal(stored["weight:frozen"], weights["frozen"])
    assert torch.equal(stored["buffer:statistic"], torch.arange(3.0))
    assert {"exp_avg:packed.b.bias", "exp_avg_sq:scale"} <= stored.keys()

    model = PackedNet()
    load_weights(model, CheckpointReader(tmp_path / f"step_{NUM_STEPS:08}"))
    expected = float(loss_function(model, samples(0)).loss_sum)
    for rank in ranks:
        assert rank["optimizer"] == OPTIMIZER_CLASS[stage]
        assert rank["has_module"] == (stage < 3)
        assert rank["evaluated"] == pytest.approx(expected, rel=1e-6)
        # At stage 3 only parameters below the threshold stay whole on a rank.
        assert rank["largest_held"] == (15 if stage == 3 else 105)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_without_clipping_the_norm_is_told_all_the_same(worker_pools: Any, stage: int) -> None:
    ranks = worker_pools(2).run(train, Case(stage, 2, clip=None), None)
    found, reference = joined([rank["results"] for rank in ranks]), torch_reference(clip=None)
    assert max(reference.norms) > 0.5  # or clipping would have made no difference
    assert found.losses == pytest.approx(reference.losses, rel=2e-6)
    assert found.norms == pytest.approx(reference.norms, rel=2e-5)


def test_tied_embeddings_train_at_stage_3(worker_pools: Any) -> None:
    ranks = worker_pools(2).run(train, Case(3, 2, offload_optimizer=True), None, True)
    found, reference = joined([rank["results"] for rank in ranks]), torch_reference(tied=True)
    assert found.losses == pytest.approx(reference.losses, rel=2e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_computes_layers_again(worker_pools: Any, stage: int) -> None:
    plain = worker_pools(2).run(train, Case(stage, 2), None)
    again = worker_pools(2).run(train, Case(stage, 2, activation_checkpointing="layers"), None)
    assert [rank["results"] for rank in again] == [rank["results"] for rank in plain]
    for one, two in zip(plain, again, strict=True):
        assert two["num_forwards"] == 2 * one["num_forwards"]
        assert two["largest_held"] == one["largest_held"]


def build_without_checkpointing(rank: int, size: int) -> str:
    from pretrain.engines.deepspeed import DeepSpeedEngine

    try:
        DeepSpeedEngine(nn.Linear(2, 2), Case(activation_checkpointing="layers").config(), torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_model_that_cannot_compute_its_layers_again_is_refused(worker_pools: Any) -> None:
    assert "Linear has no attribute activation_checkpointing" in worker_pools(1).run(build_without_checkpointing)[0]


def train_whole_and_in_two_parts(rank: int, size: int, case: Case, root: Path) -> tuple[Any, Any]:
    engine = build(case)
    whole = run_steps(engine, rank, case, range(4))
    save(engine, root / "whole", 4, rank)
    engine = build(case)
    run_steps(engine, rank, case, range(2))
    path = save(engine, root / "parts", 2, rank)
    # What a fresh engine holds must be overwritten: here the state of other steps, with small parameters gathered.
    engine = build(case)
    run_steps(engine, rank, case, range(7, 8))
    engine.eval_step(samples(7), loss_function)
    engine.import_state(CheckpointReader(path))
    parts = run_steps(engine, rank, case, range(2, 4))
    save(engine, root / "parts", 4, rank)
    return whole[2:], parts


@pytest.mark.parametrize(
    "case",
    [
        Case(0, 2),
        Case(1, 2),
        Case(2, 2),
        Case(3, 2, sub_group_size=64),
        Case(1, 2, precision="bf16"),
        Case(1, 2, precision="bf16", offload_optimizer=True),
        Case(2, 2, precision="bf16"),
        Case(3, 2, precision="bf16"),
        Case(3, 2, precision="bf16", offload_optimizer=True, offload_parameters=True),
    ],
    ids=repr,
)
def test_same_layout_resumes_bit_for_bit(worker_pools: Any, tmp_path: Path, case: Case) -> None:
    for whole, parts in worker_pools(2).run(train_whole_and_in_two_parts, case, tmp_path):
        assert whole == parts
    expected, found = (state_of(tmp_path / name / "step_00000004") for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def train_two_steps(rank: int, size: int, case: Case, root: Path) -> None:
    engine = build(case)
    run_steps(engine, rank, case, range(2))
    save(engine, root, 2, rank)


def take_over(rank: int, size: int, case: Case, path: Path, root: Path) -> list[tuple[float, float]]:
    engine = build(case)
    engine.import_state(CheckpointReader(path))
    save(engine, root, 2, rank)
    return run_steps(engine, rank, case, range(2, 6))


ALL_OR_NOTHING = {stage: sorted({offloads[0], offloads[-1]}) for stage, offloads in POSSIBLE_OFFLOADS.items()}
MOVES = [(*source, *target) for source, target in product(layouts(ALL_OR_NOTHING), repeat=2) if source != target]
MUST_MOVE = [(1, "none", 2, 3, "both", 4), (3, "none", 4, 1, "none", 2)]


@pytest.mark.parametrize("move", rotating(MOVES, 6, MUST_MOVE), ids=lambda move: "-".join(map(str, move)))
def test_any_layout_continues_any_other(worker_pools: Any, tmp_path: Path, move: tuple[Any, ...]) -> None:
    source, target = case_of(*move[:3]), case_of(*move[3:])
    worker_pools(source.size).run(train_two_steps, source, tmp_path / "from")
    path = tmp_path / "from/step_00000002"
    results = worker_pools(target.size).run(take_over, target, path, tmp_path / "to")

    moved = CheckpointReader(tmp_path / "to/step_00000002")
    assert moved.training["optimizer_scalars"] == {"step": 2.0}
    expected, found = state_of(path), state_of(tmp_path / "to/step_00000002")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    trajectory, reference = joined(results), torch_reference()
    assert trajectory.losses == pytest.approx(reference.losses[2:6], rel=2e-6)
    assert trajectory.norms == pytest.approx(reference.norms[2:6], rel=2e-5)


READ_WITHOUT_ENGINE = """
import sys
import torch
from support.engine_case import PackedNet
from pretrain.checkpoint.reader import CheckpointReader, load_weights
from pathlib import Path

model = PackedNet()
load_weights(model, CheckpointReader(Path(sys.argv[1])))
assert "deepspeed" not in sys.modules
torch.save(model.state_dict(), sys.argv[2])
"""


def weights_in_training(rank: int, size: int, root: Path) -> dict[str, torch.Tensor]:
    case = Case(1, size)
    engine = build(case)
    run_steps(engine, rank, case, range(4))
    save(engine, root, 4, rank)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def test_one_process_reads_it_without_deepspeed_bit_for_bit(worker_pools: Any, tmp_path: Path) -> None:
    expected = worker_pools(2).run(weights_in_training, tmp_path)[0]
    command = [sys.executable, "-c", READ_WITHOUT_ENGINE, tmp_path / "step_00000004", tmp_path / "weights.pt"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    found = torch.load(tmp_path / "weights.pt")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def import_into_another_model(rank: int, size: int, case: Case, path: Path) -> str:
    from pretrain.engines.deepspeed import DeepSpeedEngine

    other = PackedNet()
    other.head = nn.Linear(6, 12, bias=False)
    other.extra = nn.Parameter(torch.zeros(2))
    del other.scale
    other.scale = 1.0
    engine = DeepSpeedEngine(other, case.config(), torch.device("cpu"))
    try:
        engine.import_state(CheckpointReader(path))
    except CheckpointError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("stage", [1, 3])
def test_another_model_is_refused_with_every_difference(worker_pools: Any, tmp_path: Path, stage: int) -> None:
    worker_pools(1).run(train_two_steps, Case(1), tmp_path)
    text = worker_pools(1).run(import_into_another_model, Case(stage), tmp_path / "step_00000002")[0]
    assert "extra: missing in the checkpoint" in text
    assert "scale: not in the model" in text
    assert "head.weight: shape [11, 6] in the checkpoint, [12, 6] in the model" in text


def masters_before_training(rank: int, size: int, case: Case, root: Path) -> None:
    save(build(case), root, 0, rank)


@pytest.mark.parametrize("case", [Case(1, 2, precision="bf16"), Case(3, 2, precision="bf16", offload_optimizer=True)])
def test_bf16_masters_start_from_full_precision(worker_pools: Any, tmp_path: Path, case: Case) -> None:
    worker_pools(2).run(masters_before_training, case, tmp_path)
    stored = CheckpointReader(tmp_path / "step_00000000").tensor("embedding.weight", "master")
    assert torch.equal(stored, PackedNet().embedding.weight.detach())
    assert not torch.equal(stored, stored.bfloat16().float())
