"""Megatron-Core engine: the same training as plain torch on every layout, with Megatron's own parts at work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_case import (
    Case,
    Reference,
    build,
    differing,
    resume_and_save,
    rows_of,
    run_steps,
    samples,
    save,
    state_of,
    torch_reference,
    train_and_save,
)
from support.matrix import one_each
from torch.nn.functional import cross_entropy

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import MegatronConfig
from pretrain.models.hybrid.config import HybridConfig
from pretrain.models.hybrid.model import HybridLM
from pretrain.objectives.config import NextTokenConfig
from pretrain.objectives.protocol import LossOutput
from pretrain.parallel.canonical import canonical_buffers

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 20
# FP32 sums in another order: relative for losses (about 4), and for gradient norms.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5

LAYOUTS = {
    "one process": (1, MegatronConfig()),
    "dp2": (2, MegatronConfig(distributed_optimizer=False)),
    "dp2 distributed optimizer": (2, MegatronConfig()),
    "dp2 overlap": (2, MegatronConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000)),
    "tp2": (2, MegatronConfig(tensor_parallel=2)),
    "tp2 sp": (2, MegatronConfig(tensor_parallel=2, sequence_parallel=True)),
    "tp4 sp": (4, MegatronConfig(tensor_parallel=4, sequence_parallel=True)),
    "pp2": (2, MegatronConfig(pipeline_parallel=2)),
    "pp2 interleaved": (2, MegatronConfig(pipeline_parallel=2, virtual_pipeline=2)),
    "pp4": (4, MegatronConfig(pipeline_parallel=4)),
    "tp2 pp2": (4, MegatronConfig(tensor_parallel=2, pipeline_parallel=2)),
    "tp2 sp pp2 interleaved": (
        4,
        MegatronConfig(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2, virtual_pipeline=2),
    ),
    "dp2 tp2": (4, MegatronConfig(tensor_parallel=2)),
    "dp2 pp2": (4, MegatronConfig(pipeline_parallel=2)),
}
MATRIX = [
    (name, model, tied) for name in LAYOUTS for model in ("hybrid", "attention", "mamba") for tied in (True, False)
]


def case_of(layout: str, model: str = "hybrid", tied: bool = True, **changes: Any) -> Case:
    size, engine = LAYOUTS[layout]
    # Four micro-batches a step over all data-parallel ranks, two where there is one: what a pipeline needs at least.
    micro_batch = 4 if size == engine.tensor_parallel * engine.pipeline_parallel else 2
    return Case(engine, size, model, tied, micro_batch, **changes)


@cache
def reference(model: str, tied: bool) -> Reference:
    return torch_reference(case_of("one process", model, tied), NUM_STEPS)


@pytest.mark.parametrize(("layout", "model", "tied"), one_each(MATRIX))
def test_trains_like_plain_torch(worker_pools: Any, tmp_path: Path, layout: str, model: str, tied: bool) -> None:
    case = case_of(layout, model, tied)
    results = worker_pools(case.size, case.pool).run(train_and_save, case, tmp_path, NUM_STEPS)
    expected = reference(model, tied)
    for rank in results:
        assert [loss for loss, _ in rank] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert [norm for _, norm in rank] == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
    state = state_of(tmp_path / f"step_{NUM_STEPS:08d}")
    assert {f"master:{name}" for name in expected.weights} == {key for key in state if key.startswith("master:")}
    for name, weight in expected.weights.items():
        torch.testing.assert_close(state[f"master:{name}"], weight, rtol=1e-3, atol=2e-5)


def test_without_clipping_a_pipeline_repeats_one_process_bit_for_bit(worker_pools: Any, tmp_path: Path) -> None:
    # Untied: a tied embedding adds the gradients of its two uses in another order when they lie on two stages.
    one, two = (case_of(layout, tied=False, clip=None) for layout in ("one process", "pp2 interleaved"))
    for case in (one, two):
        worker_pools(case.size, case.pool).run(train_and_save, case, tmp_path / str(case.size), 5)
    first, second = (state_of(tmp_path / str(case.size) / "step_00000005") for case in (one, two))
    assert differing(first, second) == []


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("tp2 sp pp2 interleaved", "fp32"), ("dp2 tp2", "bf16"), ("dp2", "bf16"), ("dp2 overlap", "fp32")],
)
def test_same_layout_resumes_bit_for_bit(worker_pools: Any, tmp_path: Path, layout: str, precision: str) -> None:
    case = case_of(layout, precision=precision)
    pool = worker_pools(case.size, case.pool)
    whole = pool.run(train_and_save, case, tmp_path / "whole", 6)
    pool.run(train_and_save, case, tmp_path / "part", 3)
    parts = pool.run(resume_and_save, case, tmp_path / "part/step_00000003", tmp_path / "resumed", 3, 6)
    assert parts == [rank[3:] for rank in whole]
    assert not differing(state_of(tmp_path / "part/step_00000003"), state_of(tmp_path / "resumed/step_00000000"))
    assert not differing(state_of(tmp_path / "whole/step_00000006"), state_of(tmp_path / "resumed/step_00000006"))


def weights_and_masters(rank: int, size: int, case: Case) -> list[tuple[str, bool]]:
    """Whether weights are the rounded masters, for the elements that this rank has both of."""
    engine = build(case)
    run_steps(engine, case, range(2))
    for chunk in engine._chunks:
        if engine._overlaps_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
    found = []
    for parameter, share in engine._state.trained_shares():
        weight = parameter.tensor.detach().view(-1)[share.start : share.start + share.master.numel()]
        found.append((parameter.module_name, torch.equal(weight, share.master.to(weight.dtype))))
    return found


@pytest.mark.parametrize(("layout", "overlap"), [("dp2 pp2", False), ("dp2 pp2", True), ("tp2 pp2", False)])
def test_chunks_of_mixed_precision_keep_their_weights(worker_pools: Any, layout: str, overlap: bool) -> None:
    """Chunks after the first gather bf16 and FP32 weights together."""
    case = case_of(layout, precision="bf16")
    case = replace(
        case, engine=replace(case.engine, virtual_pipeline=2, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    )
    for found in worker_pools(case.size, case.pool).run(weights_and_masters, case):
        assert [name for name, is_equal in found if not is_equal] == []


def initial_state(rank: int, size: int, case: Case, root: Path) -> None:
    save(build(case), root, 0, rank)


@pytest.mark.parametrize("layout", ["dp2", "dp2 tp2", "tp2 pp2"])
def test_bf16_masters_start_from_full_precision(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = case_of(layout, precision="bf16")
    worker_pools(case.size, case.pool).run(initial_state, case, tmp_path)
    state = state_of(tmp_path / "step_00000000")
    expected = torch_reference(case, 0).weights
    assert not differing(state, {f"master:{name}": value for name, value in expected.items()})


def evaluate_and_train(rank: int, size: int, case: Case) -> tuple[float, bool]:
    engine = build(case)
    run_steps(engine, case, range(2))
    objective = NextTokenConfig().build()
    before = engine.eval_step(rows_of(samples(99), 0, 2), objective).loss_sum
    again = engine.eval_step(rows_of(samples(99), 0, 2), objective).loss_sum
    run_steps(engine, case, range(2, 3))
    return before, before == again


@pytest.mark.parametrize("layout", ["dp2 overlap", "tp2 sp", "tp2 sp pp2 interleaved"])
def test_evaluation_is_of_the_present_weights_and_counted_once(worker_pools: Any, layout: str) -> None:
    case = case_of(layout)
    results = worker_pools(case.size, case.pool).run(evaluate_and_train, case)
    expected = torch_reference(case, 2).evaluation
    data_parallel = case.size // (case.engine.tensor_parallel * case.engine.pipeline_parallel)  # type: ignore[union-attr]
    counted = [loss for loss, _ in results if loss]
    assert counted == pytest.approx([expected] * data_parallel, rel=1e-5)
    assert all(repeats for _, repeats in results)


def metrics_of(rank: int, size: int, case: Case) -> dict[str, float]:
    engine = build(case)
    batch = samples(0)
    targets = float(batch["loss_mask"].sum())
    objective = NextTokenConfig(z_loss=0.1).build()
    return engine.train_step([rows_of(batch, i, 2) for i in range(0, 8, 2)], objective, targets, 1e-2).metrics


def test_metrics_have_the_same_names_everywhere_and_count_once(worker_pools: Any) -> None:
    case = case_of("tp2 pp2")
    results = worker_pools(case.size, case.pool).run(metrics_of, case)
    assert all(metrics.keys() == {"cross_entropy", "z_loss"} for metrics in results)
    assert sum(metrics["z_loss"] > 0 for metrics in results) == 1


@dataclass(frozen=True, kw_only=True)
class StatisticConfig(HybridConfig):
    """A model with a running statistic, which differs between data-parallel ranks, and a frozen parameter."""

    def build(self, layers: Any, stage: Any = None) -> HybridLM:
        return StatisticLM(self, layers, stage)


class StatisticLM(HybridLM):
    def __init__(self, config: HybridConfig, layers: Any, stage: Any) -> None:
        super().__init__(config, layers, stage)
        if self.stage.has_head:
            self.final_norm.weight.requires_grad_(False)
            self.register_buffer("mean_token", torch.zeros(3))

    def forward(self, tokens_LB: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        if self.stage.has_head and self.training:
            self.mean_token.mul_(0.5).add_(tokens_LB.float().mean())  # type: ignore[operator]
        return super().forward(tokens_LB, *arguments, **more)


def statistic_case(layout: str) -> Case:
    case = case_of(layout)
    fields = {field.name: getattr(case.config().model, field.name) for field in dataclasses.fields(HybridConfig)}
    return replace(case, model_config=StatisticConfig(**fields))


def statistics_after(rank: int, size: int, case: Case, root: Path, checkpoint: Path | None) -> list[float]:
    engine = build(case)
    if checkpoint is not None:
        engine.import_state(CheckpointReader(checkpoint))
    run_steps(engine, case, range(2 if checkpoint else 0, 4 if checkpoint else 2))
    save(engine, root, 4 if checkpoint else 2, rank)
    return [
        float(value) for module in engine._state._modules for _, value in canonical_buffers(module) for value in value
    ]


@pytest.mark.parametrize("layout", ["dp2", "dp2 pp2"])
def test_buffers_and_frozen_parameters_are_state(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = statistic_case(layout)
    pool = worker_pools(case.size, case.pool)
    found = [values for values in pool.run(statistics_after, case, tmp_path, None) if values]
    assert len(found) == 2
    assert found[0] == found[1]
    saved = state_of(tmp_path / "step_00000002")
    assert saved["buffer:mean_token"].tolist() == found[0]
    assert torch.equal(saved["weight:final_norm.weight"], torch.ones(32))
    again = [values for values in pool.run(statistics_after, case, tmp_path, tmp_path / "step_00000002") if values]
    assert again[0] == again[1]
    assert again[0] != found[0]


class WholeVocabulary:
    """An objective from outside that expects logits over the whole vocabulary."""

    def denominator(self, batch: dict[str, torch.Tensor]) -> float:
        return float(batch["loss_mask"].sum())

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> LossOutput:
        arguments = (batch[name].t() for name in ("tokens", "seq_idx", "position_ids"))
        logits = model(*arguments)
        loss = cross_entropy(logits.flatten(0, 1), batch["targets"].t().flatten().long(), reduction="none")
        return LossOutput((loss * batch["loss_mask"].t().flatten()).sum())


def step_with(rank: int, size: int, case: Case, objective: Any) -> tuple[float, float]:
    engine = build(case)
    batch = samples(0)
    micro = [rows_of(batch, i, 2) for i in range(0, 8, 2)]
    result = engine.train_step(micro, objective, float(batch["loss_mask"].sum()), 1e-2)
    return result.loss_sum, result.grad_norm


def test_an_objective_from_outside_sees_the_whole_vocabulary(worker_pools: Any) -> None:
    case = case_of("tp2 pp2")
    results = worker_pools(case.size, case.pool).run(step_with, case, WholeVocabulary())
    expected = torch_reference(case, 1)
    targets = float(samples(0)["loss_mask"].sum())
    assert sum(loss for loss, _ in results) / targets == pytest.approx(expected.losses[0], rel=LOSS_TOLERANCE)
    assert [norm for _, norm in results] == pytest.approx([expected.norms[0]] * 4, rel=NORM_TOLERANCE)


def what_ran(rank: int, size: int, case: Case) -> dict[str, Any]:
    """Classes of the engine's parts, and the collectives of one step as torch's profiler saw them."""
    engine = build(case)
    run_steps(engine, case, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_steps(engine, case, range(1, 2))
    optimizer = engine._optimizer.chained_optimizers[0]
    module = engine._chunks[0].module.module
    return {
        "schedule": f"{engine._schedule.__module__}.{engine._schedule.__name__}",
        "ddp": {f"{type(chunk).__module__}.{type(chunk).__name__}" for chunk in engine._chunks},
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "inner": f"{type(optimizer.optimizer).__module__}.{type(optimizer.optimizer).__name__}",
        "layers": {base.__name__ for part in module.modules() for base in type(part).__mro__},
        "collectives": {event.key for event in profile.key_averages() if event.key.startswith(("gloo:", "c10d::"))},
        "chunks": len(engine._chunks),
    }


def test_megatrons_own_parts_run(worker_pools: Any) -> None:
    case = case_of("tp2 sp pp2 interleaved")
    for ran in worker_pools(case.size, case.pool).run(what_ran, case):
        assert ran["schedule"] == (
            "megatron.core.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving"
        )
        assert ran["chunks"] == 2
        assert ran["ddp"] == {"megatron.core.distributed.distributed_data_parallel.DistributedDataParallel"}
        assert ran["optimizer"] == "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        assert ran["inner"] == "torch.optim.adamw.AdamW"
        assert {"ColumnParallelLinear", "RowParallelLinear"} <= ran["layers"]
        # Sequence parallel gathers and reduce-scatters activations; the pipeline sends and receives.
        assert {"gloo:send", "gloo:recv"} <= ran["collectives"]
        assert {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"} <= ran["collectives"]
    plain = case_of("dp2")
    for ran in worker_pools(plain.size, plain.pool).run(what_ran, plain):
        assert ran["schedule"].endswith(".forward_backward_no_pipelining")
        assert ran["optimizer"] == "megatron.core.optimizer.optimizer.FP32Optimizer"
        assert "gloo:all_reduce" in ran["collectives"]
        assert "c10d::_reduce_scatter_base_" not in ran["collectives"]


def test_activation_checkpointing_changes_no_bit(worker_pools: Any, tmp_path: Path) -> None:
    case = case_of("tp2 sp")
    for name, policy in (("kept", "none"), ("recomputed", "layers")):
        changed = replace(case, activation_checkpointing=policy)
        worker_pools(case.size, case.pool).run(train_and_save, changed, tmp_path / name, 3)
    assert not differing(state_of(tmp_path / "kept/step_00000003"), state_of(tmp_path / "recomputed/step_00000003"))
