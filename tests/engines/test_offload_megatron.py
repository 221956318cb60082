"""Offloaded optimizer state in the Megatron-Core engine: where state lies and is updated changes no bit of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_case import build, differing, run_steps, state_of, train_and_save
from support.matrix import rotating
from support.offload_engine_case import device_of
from support.offload_lm_case import OffloadCase

from pretrain.config.schema import DeepSpeedConfig, MegatronConfig, OffloadConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 4
Trained = tuple[list[list[tuple[float, float]]], dict[str, torch.Tensor]]
"""(Loss, gradient norm) by rank and step, and the state at the end."""

# Four micro-batches a step on each data-parallel rank, two where there are four processes: clipping is at work in all.
LAYOUTS = {
    "dp2 bf16": OffloadCase(MegatronConfig(), 2, precision="bf16", micro_batch=1),
    "dp2 fp32": OffloadCase(MegatronConfig(), 2, micro_batch=1),
    "dp2 overlap bf16": OffloadCase(
        MegatronConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000), 2, precision="bf16"
    ),
    "dp2 mamba bf16 unclipped": OffloadCase(MegatronConfig(), 2, "mamba", precision="bf16", clip=None),
    "dp2 tp2 sp bf16": OffloadCase(MegatronConfig(tensor_parallel=2, sequence_parallel=True), 4, precision="bf16"),
    "dp2 pp2 fp32": OffloadCase(MegatronConfig(pipeline_parallel=2), 4),
    "tp2 sp pp2 interleaved bf16": OffloadCase(
        MegatronConfig(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2, virtual_pipeline=2),
        4,
        precision="bf16",
    ),
}
PLANS = {
    "on the CPU": OffloadConfig(enabled=True, fraction=0.0, subgroup_size=700),
    "streamed": OffloadConfig(enabled=True, fraction=1.0, subgroup_size=301),
    "mixed": OffloadConfig(enabled=True, fraction=0.6, resident_fraction=0.3, subgroup_size=97),
    "mixed low bits": OffloadConfig(enabled=True, fraction=0.5, subgroup_size=700, master="low_bits"),
    "mixed serial": OffloadConfig(enabled=True, fraction=0.5, subgroup_size=400, overlap=False, cpu_threads=2),
    "one subgroup": OffloadConfig(enabled=True, fraction=0.0),
}
RESIDENT = OffloadConfig(enabled=True, resident_fraction=1.0)
MATRIX = [
    (layout, plan)
    for layout in LAYOUTS
    for plan in PLANS
    if "low bits" not in plan or LAYOUTS[layout].precision == "bf16"
]
ALWAYS = [
    ("dp2 bf16", "mixed low bits"),
    ("dp2 fp32", "mixed"),
    ("dp2 tp2 sp bf16", "mixed"),
    ("tp2 sp pp2 interleaved bf16", "streamed"),
]


@pytest.fixture(scope="module")
def trained(worker_pools: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, OffloadConfig], Trained]:
    """What a layout trains to with an offload configuration, computed on first use."""

    @cache
    def run(layout: str, offload: OffloadConfig) -> Trained:
        case = replace(LAYOUTS[layout], offload=offload)
        root = tmp_path_factory.mktemp("trained")
        results = worker_pools(case.size, case.pool).run(train_and_save, case, root, NUM_STEPS)
        return results, state_of(root / f"step_{NUM_STEPS:08d}")

    return run


@pytest.mark.parametrize(("layout", "plan"), rotating(MATRIX, 6, ALWAYS))
def test_place_and_subgroups_change_no_bit(trained: Callable[..., Trained], layout: str, plan: str) -> None:
    expected_results, expected = trained(layout, RESIDENT)
    results, state = trained(layout, PLANS[plan])
    assert results == expected_results
    assert differing(state, expected) == []
    if LAYOUTS[layout].clip is not None:
        assert all(norm > 0.5 for _, norm in results[0])  # or clipping was not at work


def train_staged(rank: int, size: int, case: OffloadCase, root: Path, steps: int) -> Any:
    with device_of(case):
        return train_and_save(rank, size, case, root, steps)


@pytest.mark.parametrize(
    ("layout", "plan", "device"),
    [("dp2 overlap bf16", "mixed low bits", "late"), ("dp2 fp32", "mixed", "prompt")],
)
def test_gradients_and_weights_that_are_staged_change_no_bit(
    worker_pools: Any, tmp_path: Path, trained: Callable[..., Trained], layout: str, plan: str, device: str
) -> None:
    expected_results, expected = trained(layout, RESIDENT)
    case = replace(LAYOUTS[layout], offload=PLANS[plan], device=device)
    assert worker_pools(2, case.pool).run(train_staged, case, tmp_path, NUM_STEPS) == expected_results
    assert differing(state_of(tmp_path / f"step_{NUM_STEPS:08d}"), expected) == []


@pytest.mark.parametrize(
    "layout", [layout for (layout,) in rotating([(name,) for name in LAYOUTS], 3, [("dp2 fp32",)])]
)
def test_trains_like_the_run_without_offload(trained: Callable[..., Trained], layout: str) -> None:
    plain_results, plain = trained(layout, OffloadConfig())
    results, state = trained(layout, PLANS["mixed"])
    is_bf16 = LAYOUTS[layout].precision == "bf16"
    for mine, theirs in zip(results, plain_results, strict=True):
        assert mine[0] == theirs[0]
        # A weight whose master differs in the last bit may round to another bf16 weight.
        assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], rel=1e-4 if is_bf16 else 1e-6)
        assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=2e-2 if is_bf16 else 1e-5)
    assert state.keys() == plain.keys()
    for name, values in state.items():
        assert values.dtype == torch.float32
        if name.startswith("master:"):
            torch.testing.assert_close(values, plain[name], rtol=1e-3, atol=1e-3 if is_bf16 else 2e-6, msg=name)


def test_trains_like_the_deepspeed_engine_with_offload(
    worker_pools: Any, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    results, state = trained("dp2 fp32", PLANS["mixed"])
    case = OffloadCase(DeepSpeedConfig(zero_stage=2), 2, micro_batch=1, offload=PLANS["mixed"])
    other = worker_pools(2, case.pool).run(train_and_save, case, tmp_path, NUM_STEPS)
    for mine, theirs in zip(results, other, strict=True):
        assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], rel=1e-6)
        assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-5)
    theirs = state_of(tmp_path / f"step_{NUM_STEPS:08d}")
    assert state.keys() == theirs.keys()
    for name, values in state.items():
        if name.startswith("master:"):
            torch.testing.assert_close(values, theirs[name], rtol=1e-3, atol=2e-5, msg=name)


def what_is_held(rank: int, size: int, case: OffloadCase) -> dict[str, Any]:
    """What Megatron's optimizer holds after two steps."""
    engine = build(case)
    run_steps(engine, case, range(2))
    distributed = engine._optimizer.chained_optimizers[0]
    shards = [shard for group in distributed.optimizer.param_groups for shard in group["params"]]
    storages = {buffer.param_data.untyped_storage().data_ptr() for buffer in distributed.buffers}
    return {
        "class": type(distributed).__name__,
        "main": [main for group in distributed.shard_fp32_from_float16_groups for main in group if main is not None]
        + [p for module in engine.parts for p in module.parameters() if getattr(p, "main_param", None) is not None],
        "state": len(distributed.optimizer.state),
        "views": all(shard.untyped_storage().data_ptr() in storages for shard in shards),
        "elements": sum(shard.numel() for shard in shards),
        "host_bytes": engine.offload.states.host_bytes,
        "dtypes": {shard.dtype for shard in shards},
    }


@pytest.mark.parametrize(("master", "width"), [("full", 12), ("low_bits", 10)])
def test_megatron_keeps_no_second_copy(worker_pools: Any, master: str, width: int) -> None:
    offload = OffloadConfig(enabled=True, fraction=0.0, master=master, subgroup_size=700)  # type: ignore[arg-type]
    case = replace(LAYOUTS["dp2 bf16"], model="attention", offload=offload)
    for held in worker_pools(2, case.pool).run(what_is_held, case):
        assert held["class"] == "DistributedOptimizer"
        assert held["main"] == []
        assert held["state"] == 0
        assert held["views"]
        assert held["dtypes"] == {torch.bfloat16}
        assert held["host_bytes"] == width * held["elements"]


def early_starts(rank: int, size: int, case: OffloadCase) -> list[str]:
    """Calls of one step: forward and backward passes of the first chunk, start_early, gradients, the norm."""
    engine = build(case)
    calls: list[str] = []

    def noted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        setattr(owner, name, call)

    noted(engine.offload.states, "start_early")
    noted(engine.offload, "send_gradients")
    noted(engine._state.optimizer, "get_grad_norm")
    engine._chunks[0].register_forward_hook(lambda *_: calls.append("forward"))
    layer = next(p for name, p in engine.parts[0].named_parameters() if "norm" in name)
    layer.register_hook(lambda _: calls.append("backward"))
    run_steps(engine, case, range(1))
    return calls


@pytest.mark.parametrize("layout", ["dp2 bf16", "dp2 pp2 fp32", "tp2 sp pp2 interleaved bf16"])
def test_state_is_brought_when_the_last_backward_pass_begins(worker_pools: Any, layout: str) -> None:
    case = LAYOUTS[layout]
    for calls in worker_pools(case.size, case.pool).run(early_starts, case):
        num_microbatches = calls.count("forward")
        assert num_microbatches > 1
        assert calls.count("backward") == num_microbatches
        assert calls.count("start_early") == 1
        # Exactly one backward pass of this chunk is still to come, and no forward pass.
        assert calls[-4:] == ["start_early", "backward", "send_gradients", "get_grad_norm"]


def clipped_alike(rank: int, size: int) -> list[tuple[bool, float]]:
    from pretrain.engines.megatron_offload import clip_factor
    from pretrain.parallel.megatron_import import import_megatron

    import_megatron("cpu")
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = []
    for norm in (0.0, 0.3, 0.5 - 1e-6, 0.5, 7.123, 1e30, math.inf, math.nan):
        for limit in (0.5, math.inf):
            parameter = torch.nn.Parameter(torch.zeros(1000))
            parameter.grad = gradient.clone()
            clip_grad_by_total_norm_fp32([parameter], limit, norm)
            factor = clip_factor(norm, limit)
            scaled = gradient * torch.tensor(factor, dtype=torch.float32)
            found.append((torch.equal(parameter.grad, scaled), factor))
    return found


def test_the_clip_factor_is_megatrons(worker_pools: Any) -> None:
    (found, _) = worker_pools(2, "megatron").run(clipped_alike)
    assert all(equal for equal, _ in found)
    assert {factor for _, factor in found} > {0.0, 1.0}


def contract(rank: int, size: int) -> tuple[list[str], list[str]]:
    """What differs from the contract of the installed version, and of one with other methods."""
    from pretrain.engines.megatron_offload_contract import contract_violations
    from pretrain.parallel.megatron_import import import_megatron

    import_megatron("cpu")
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    as_is = list(contract_violations())
    kept = DistributedOptimizer._get_model_param_range_map, DistributedOptimizer._copy_model_grads_to_main_grads
    norm = MegatronOptimizer.get_grad_norm
    try:
        DistributedOptimizer._get_model_param_range_map = lambda self, parameter: None
        DistributedOptimizer._copy_model_grads_to_main_grads = lambda self: None
        del MegatronOptimizer.get_grad_norm
        changed = list(contract_violations())
    finally:
        DistributedOptimizer._get_model_param_range_map, DistributedOptimizer._copy_model_grads_to_main_grads = kept
        MegatronOptimizer.get_grad_norm = norm
    return as_is, changed


def test_megatrons_internals_are_as_they_were_read(worker_pools: Any) -> None:
    for as_is, changed in worker_pools(2, "megatron").run(contract):
        assert as_is == []
        text = "; ".join(changed)
        assert "DistributedOptimizer._get_model_param_range_map takes (parameter), expected (param)" in text
        assert "DistributedOptimizer._copy_model_grads_to_main_grads has nothing of" in text
        assert "MegatronOptimizer has no get_grad_norm" in text


def refused(rank: int, size: int, case: OffloadCase) -> str:
    """The error where Megatron goes on to make main parameters of its own."""
    import pretrain.engines.megatron as engine

    kept, engine.leave_masters_outside = engine.leave_masters_outside, lambda optimizer_config: None
    try:
        build(case)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.leave_masters_outside = kept
    return ""


def test_shards_that_are_no_views_of_weights_are_refused(worker_pools: Any) -> None:
    for error in worker_pools(2, "megatron").run(refused, LAYOUTS["dp2 bf16"]):
        assert error.startswith("optimizer.offload was tested with megatron-core")
        assert "is no view of the weight (torch.bfloat16)" in error
        assert "optimizer.offload.enabled=false" in error
