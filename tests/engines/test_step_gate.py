"""A step whose update is not accepted leaves no trace, on any engine and layout, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import engine_case, lm_case
from support.matrix import rotating
from support.offload_lm_case import OffloadCase

from pretrain.config.schema import DeepSpeedConfig, MegatronConfig, OffloadConfig
from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.process import all_reduce_floats

pytestmark = pytest.mark.distributed


def _zero3(**fields: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=3, persistence_threshold=100, **fields)


def _states(**fields: Any) -> OffloadConfig:
    return OffloadConfig(enabled=True, subgroup_size=400, **fields)


LAYOUTS = {
    "zero0": lm_case.Case(DeepSpeedConfig(zero_stage=0), 2),
    "zero0 muon": lm_case.Case(DeepSpeedConfig(zero_stage=0), 2, muon=True),
    "zero1": lm_case.Case(DeepSpeedConfig(zero_stage=1), 2),
    "zero1 bf16": lm_case.Case(DeepSpeedConfig(zero_stage=1), 2, precision="bf16"),
    "zero1 bf16 muon": lm_case.Case(DeepSpeedConfig(zero_stage=1), 2, precision="bf16", muon=True),
    "zero1 offloaded bf16": lm_case.Case(DeepSpeedConfig(zero_stage=1, offload_optimizer=True), 2, precision="bf16"),
    "zero2": lm_case.Case(DeepSpeedConfig(zero_stage=2), 2, clip=None),
    "zero2 bf16": lm_case.Case(DeepSpeedConfig(zero_stage=2), 2, precision="bf16"),
    "zero2 overlap": lm_case.Case(DeepSpeedConfig(zero_stage=2, overlap_comm=True), 2),
    "zero2 offloaded muon": lm_case.Case(DeepSpeedConfig(zero_stage=2, offload_optimizer=True), 2, muon=True),
    "zero3": lm_case.Case(_zero3(), 2),
    "zero3 bf16": lm_case.Case(_zero3(), 2, precision="bf16"),
    "zero3 muon": lm_case.Case(_zero3(), 2, muon=True),
    "zero3 offloaded": lm_case.Case(_zero3(offload_optimizer=True, offload_parameters=True), 2),
    "zero3 offloaded bf16 muon": lm_case.Case(
        _zero3(offload_optimizer=True, offload_parameters=True), 2, precision="bf16", muon=True
    ),
    "zero1 states offloaded bf16": OffloadCase(DeepSpeedConfig(zero_stage=1), 2, precision="bf16"),
    "zero2 states offloaded": OffloadCase(DeepSpeedConfig(zero_stage=2, overlap_comm=True), 2),
    "zero3 states offloaded bf16": OffloadCase(_zero3(), 2, precision="bf16"),
    "megatron dp2 distributed": lm_case.Case(MegatronConfig(), 2),
    "megatron dp2 distributed bf16": lm_case.Case(MegatronConfig(), 2, precision="bf16"),
    "megatron dp2 distributed overlap": lm_case.Case(
        MegatronConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2
    ),
    "megatron dp2": lm_case.Case(MegatronConfig(distributed_optimizer=False), 2),
    "megatron dp2 bf16": lm_case.Case(MegatronConfig(distributed_optimizer=False), 2, precision="bf16"),
    "megatron dp2 muon": lm_case.Case(MegatronConfig(), 2, muon=True, clip=None),
    "megatron tp2 sp": lm_case.Case(MegatronConfig(tensor_parallel=2, sequence_parallel=True), 2),
    "megatron pp2 bf16": lm_case.Case(MegatronConfig(pipeline_parallel=2), 2, precision="bf16"),
    "megatron dp2 states offloaded": OffloadCase(MegatronConfig(), 2, offload=_states(fraction=0.5)),
    "megatron dp2 overlap states offloaded bf16": OffloadCase(
        MegatronConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        2,
        precision="bf16",
        offload=_states(fraction=0.5, resident_fraction=0.3, master="low_bits"),
    ),
    "megatron pp2 states offloaded bf16": OffloadCase(
        MegatronConfig(pipeline_parallel=2), 2, precision="bf16", offload=_states(fraction=1.0, overlap=False)
    ),
}
ALWAYS = [("zero1 bf16",), ("zero3",), ("megatron dp2 distributed",)]


@pytest.mark.parametrize("layout", [layout for (layout,) in rotating([(name,) for name in LAYOUTS], 9, ALWAYS)])
def test_a_refused_step_leaves_no_trace(worker_pools: Any, layout: str) -> None:
    case = LAYOUTS[layout]
    results = worker_pools(case.size, case.pool).run(_refuse_and_compare, case)
    for differing, calls, gradient_norms in results:
        assert differing == {}
        for norm, squared in gradient_norms:
            assert math.sqrt(squared) == pytest.approx(norm, rel=1e-4)
        # Asked once a step: finite and not finite, at the very first step and later.
        assert [math.isfinite(loss) and math.isfinite(norm) for loss, norm in calls] == [False, True, True, False, True]


def _refuse_and_compare(rank: int, size: int, case: lm_case.Case) -> tuple[Any, ...]:
    never = lm_case.build(case)
    plain = lm_case.run_steps(never, case, range(3))
    expected = _state(never)
    del never
    seen: list[tuple[float, float]] = []
    norms: list[tuple[float, float]] = []
    engine = lm_case.build(case)

    def step(data: int, at: int, answer: bool, factor: float = 1.0) -> tuple[float, float]:
        batch = lm_case.samples(data)
        targets = float(batch["loss_mask"].sum())
        starts = range(case.micro_batch * engine.dp_rank, lm_case.GLOBAL_BATCH, case.micro_batch * engine.dp_size)
        micro = [lm_case.rows_of(batch, start, case.micro_batch) for start in starts]

        def accept(result: Any) -> bool:
            loss = all_reduce_floats([result.loss_sum])[0] / targets
            seen.append((loss, result.grad_norm))
            if math.isfinite(result.grad_norm):
                own = sum(float(f.values.double().square().sum()) for f in engine.gradients())
                norms.append((result.grad_norm, all_reduce_floats([own])[0]))
            return answer

        result = engine.train_step(micro, _scaled(factor), targets, lm_case.rate(at), accept)
        return all_reduce_floats([result.loss_sum])[0] / targets, result.grad_norm

    trained = []
    step(50, 0, False, math.nan)
    trained.append(step(0, 0, True))
    step(51, 1, False, 30.0)
    step(52, 1, False, math.nan)
    trained.append(step(1, 1, True))
    # Without the question, as the plain run.
    trained += lm_case.run_steps(engine, case, range(2, 3))
    differing = dict.fromkeys(lm_case.differing(expected, _state(engine)), "differs")
    if trained != plain:
        differing["results"] = f"{trained} {plain}"
    if engine.scalar_state() != {"step": 3.0}:
        differing["scalars"] = str(engine.scalar_state())
    return differing, seen, norms


def _scaled(factor: float) -> Any:
    objective = NextTokenConfig().build()

    def loss(model: Any, batch: Any) -> Any:
        output = objective(model, batch)
        if factor == 1.0:
            return output
        return type(output)(output.loss_sum * factor, output.metrics)

    loss.vocabulary_parallel = getattr(objective, "vocabulary_parallel", False)  # type: ignore[attr-defined]
    return loss


def _state(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's fragments, and its weights where the forward pass reads others than the masters."""
    state = {f"{f.slot}:{f.name}:{f.start}": f.values.detach().clone() for f in engine.export_state()}
    if engine.module is not None:
        state |= {f"weight:{name}": value.detach().clone() for name, value in engine.module.named_parameters()}
    return state


def test_running_statistics_of_a_refused_step_are_taken_back(worker_pools: Any) -> None:
    for result in worker_pools(2, "").run(_statistics, engine_case.Case(stage=1, size=2)):
        assert result == [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]


def _statistics(rank: int, size: int, case: engine_case.Case) -> list[list[float]]:
    engine = engine_case.build(case)
    batch = engine_case.samples(0)
    micro = [{name: value[: case.micro_batch] for name, value in batch.items()}] * 2

    def counting(model: Any, rows: Any) -> Any:
        engine.module.statistic += 1.0
        return engine_case.loss_function(model, rows)

    found = []
    for answer in (False, True):
        engine.train_step(micro, counting, 8.0, 1e-2, lambda _, answer=answer: answer)
        found.append(engine.module.statistic.tolist())
    return found
