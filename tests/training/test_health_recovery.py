"""Bad steps in training: left out, gone back behind, or stopped at; then exactly as if the data had not been there."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.health_case import Plan, train
from support.lm_case import Case, differing, state_of
from support.matrix import rotating

from pretrain.config.launch_schema import HealthConfig
from pretrain.config.schema import DeepSpeedConfig, MegatronConfig

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "zero0": Case(DeepSpeedConfig(zero_stage=0), 2),
    "zero1 bf16": Case(DeepSpeedConfig(zero_stage=1), 2, precision="bf16"),
    "zero2 bf16 offloaded": Case(DeepSpeedConfig(zero_stage=2, offload_optimizer=True), 2, precision="bf16"),
    "zero3": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=100), 2),
    "zero3 bf16 muon": Case(DeepSpeedConfig(zero_stage=3, persistence_threshold=100), 2, precision="bf16", muon=True),
    "megatron distributed overlap": Case(MegatronConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2),
    "megatron bf16": Case(MegatronConfig(), 2, precision="bf16"),
    "megatron plain bf16": Case(MegatronConfig(distributed_optimizer=False), 2, precision="bf16"),
    "megatron tp2": Case(MegatronConfig(tensor_parallel=2, sequence_parallel=True), 2),
    "megatron pp2": Case(MegatronConfig(pipeline_parallel=2), 2),
}
ROLLBACK = HealthConfig(on_nonfinite="rollback", skip_window=2)
SKIP = HealthConfig(on_nonfinite="skip")
QUICK = LAYOUTS["zero1 bf16"]


def run(pools: Any, plan: Plan, root: Path) -> dict[str, Any]:
    """Rank 0's outcome, having made sure that all ranks have the same."""
    results = pools(plan.case.size, plan.case.pool).run(train, plan, root)
    for result in results[1:]:
        for key in ("losses", "made", "failure", "state", "bad"):
            assert repr(result[key]) == repr(results[0][key])  # NaN differs from itself
    return results[0]


def final(root: Path, step: int = 6) -> Any:
    return state_of(root / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("layout", [name for (name,) in rotating([(n,) for n in LAYOUTS], 3, [("zero1 bf16",)])])
def test_a_rollback_ends_where_a_run_without_the_batches_ends(worker_pools: Any, tmp_path: Path, layout: str) -> None:
    case = LAYOUTS[layout]
    # Twice: behind a checkpoint of step 2, and in the very first step, behind none but the initial state.
    plan = Plan(case, ROLLBACK, bad={0: math.nan, 4: math.nan})
    disturbed = run(worker_pools, plan, tmp_path / "disturbed")
    told = run(worker_pools, dataclasses.replace(plan, bad={}, skipped=(0, 3, 4)), tmp_path / "told")
    assert [(bad.step, bad.batch, bad.action, bad.to_step, bad.skipped) for bad in disturbed["bad"]] == [
        (1, 0, "rollback", 0, [0]),
        (4, 4, "rollback", 2, [3, 4]),
    ]
    assert disturbed["made"] == 6 + 1  # step 3 on batch 3, gone back behind
    assert disturbed["losses"] == told["losses"]
    assert disturbed["state"] == told["state"]
    assert disturbed["state"]["skipped"] == [0, 3, 4]
    assert disturbed["state"]["samples"] == 9 * 8
    assert differing(final(tmp_path / "disturbed"), final(tmp_path / "told")) == []


def test_a_skip_ends_where_a_run_without_the_batch_ends(worker_pools: Any, tmp_path: Path) -> None:
    plan = Plan(QUICK, SKIP, bad={1: math.nan, 2: math.inf})
    disturbed = run(worker_pools, plan, tmp_path / "disturbed")
    told = run(worker_pools, dataclasses.replace(plan, bad={}, skipped=(1, 2)), tmp_path / "told")
    assert disturbed["made"] == 6
    assert disturbed["losses"] == told["losses"]
    assert differing(final(tmp_path / "disturbed"), final(tmp_path / "told")) == []
    assert not (tmp_path / "disturbed" / "checkpoints" / "step_00000000").exists()

    # What happened is on record, with the samples of all ranks in order.
    record = json.loads((tmp_path / "disturbed" / "health" / "step_00000002.json").read_text())
    first, second = record["events"]
    assert (first["batch"], first["kind"], first["action"], first["loss"]) == (1, "nonfinite", "skip", "NaN")
    assert (second["batch"], second["skipped"], second["skipped_before"]) == (2, [2], [1])
    assert [sample["id"] for sample in second["samples"]] == list(range(16, 24))
    assert second["samples"][0]["provenance"] == [{"row": 16}]
    assert [event["sample_ids"] for event in disturbed["events"]] == [[8, 15], [16, 23]]


def test_what_was_skipped_stays_skipped_after_a_resume_on_another_layout(worker_pools: Any, tmp_path: Path) -> None:
    plan = Plan(QUICK, SKIP, bad={1: math.nan})
    run(worker_pools, dataclasses.replace(plan, steps=4), tmp_path)
    # The batch would be harmless now: it must not come back all the same.
    moved = dataclasses.replace(plan, case=LAYOUTS["megatron bf16"], bad={})
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    outcome = run(worker_pools, moved, tmp_path)
    assert outcome["state"] == {"step": 6, "samples": 7 * 8, "tokens": outcome["state"]["tokens"], "skipped": [1]}
    undisturbed = run(worker_pools, dataclasses.replace(plan, bad={}, skipped=(1,)), tmp_path / "told")
    assert [outcome["losses"][step] for step in (3, 4, 5, 6)] == pytest.approx(
        [undisturbed["losses"][step] for step in (3, 4, 5, 6)], rel=2e-3
    )
    assert outcome["state"]["tokens"] == undisturbed["state"]["tokens"]


def test_stopping_leaves_the_state_before_the_step(worker_pools: Any, tmp_path: Path) -> None:
    outcome = run(worker_pools, Plan(QUICK, HealthConfig(), bad={2: math.nan}), tmp_path)
    assert outcome["failure"].startswith("NonFiniteError: Step 3: loss nan, gradient norm inf.")
    assert "global samples 16..23" in outcome["failure"]
    assert outcome["state"]["step"] == 2
    assert list(outcome["losses"]) == [1, 2]
    # The checkpoint that was under way is whole.
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000002"]
    # Stopping again at the same batch is the same event.
    run(worker_pools, Plan(QUICK, HealthConfig(), bad={2: math.nan}), tmp_path)
    assert len(json.loads((tmp_path / "health" / "step_00000003.json").read_text())["events"]) == 1


def test_too_many_bad_steps_stop_the_run(worker_pools: Any, tmp_path: Path) -> None:
    health = dataclasses.replace(SKIP, max_events=2)
    outcome = run(worker_pools, Plan(QUICK, health, bad=dict.fromkeys((0, 1, 3), math.nan)), tmp_path)
    assert [bad.action for bad in outcome["bad"]] == ["skip", "skip", "stop"]
    assert "the run has had 2 bad steps (health.max_events)" in outcome["failure"]
    assert outcome["state"]["skipped"] == [0, 1]


def test_a_spike_is_found_before_it_is_learned(worker_pools: Any, tmp_path: Path) -> None:
    health = HealthConfig(on_spike="rollback", spike_window=3, spike_zscore=8.0, skip_window=1)
    # Batch 1 is no less of a spike, but too few losses are known then.
    plan = Plan(QUICK, health, bad={1: 3.0, 4: 3.0})
    disturbed = run(worker_pools, plan, tmp_path / "disturbed")
    told = run(worker_pools, dataclasses.replace(plan, bad={1: 3.0}, skipped=(4,)), tmp_path / "told")
    (bad,) = disturbed["bad"]
    assert (bad.step, bad.batch, bad.fault.kind, bad.to_step) == (5, 4, "spike", 4)
    assert disturbed["losses"] == told["losses"]
    assert differing(final(tmp_path / "disturbed"), final(tmp_path / "told")) == []


def test_without_a_checkpoint_before_the_window_the_window_is_cut(worker_pools: Any, tmp_path: Path) -> None:
    health = dataclasses.replace(ROLLBACK, skip_window=3)
    plan = Plan(QUICK, health, bad={5: math.nan}, keep_checkpoints=1, behind=False)
    outcome = run(worker_pools, plan, tmp_path)
    (bad,) = outcome["bad"]
    assert (bad.to_step, bad.skipped) == (4, [4, 5])
    assert outcome["state"]["step"] == 6


def test_a_damaged_checkpoint_is_not_gone_back_to_and_later_ones_are_set_aside(
    worker_pools: Any, tmp_path: Path
) -> None:
    plan = Plan(QUICK, dataclasses.replace(ROLLBACK, skip_window=1), steps=5)
    run(worker_pools, dataclasses.replace(plan, steps=4), tmp_path / "run")
    weights = next((tmp_path / "run" / "checkpoints" / "step_00000004").glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    shutil.copytree(tmp_path / "run", tmp_path / "intact")
    # Damaged while the run goes on: it has loaded the checkpoint already.
    outcome = _run_and_damage(worker_pools, dataclasses.replace(plan, bad={4: math.nan}), tmp_path / "run", weights)
    assert len(damaged) == weights_size(tmp_path / "run")
    (bad,) = outcome["bad"]
    assert (bad.step, bad.to_step, bad.skipped) == (5, 2, [4])
    assert (tmp_path / "run" / "checkpoints" / "set_aside_0001" / "step_00000004").is_dir()
    told = run(worker_pools, dataclasses.replace(plan, skipped=(4,)), tmp_path / "intact")
    assert outcome["losses"][5] == told["losses"][5]
    assert differing(final(tmp_path / "run", 5), final(tmp_path / "intact", 5)) == []


def weights_size(root: Path) -> int:
    return next((root / "checkpoints" / "set_aside_0001" / "step_00000004").glob("*.safetensors")).stat().st_size


def _run_and_damage(pools: Any, plan: Plan, root: Path, weights: Path) -> dict[str, Any]:
    results = pools(plan.case.size, plan.case.pool).run(_damage_and_train, plan, root, weights)
    return results[0]  # type: ignore[no-any-return]


def _damage_and_train(rank: int, size: int, plan: Plan, root: Path, weights: Path) -> dict[str, Any]:
    import torch
    from support import health_case

    real = health_case.resume

    def resume_then_damage(*arguments: Any) -> Any:
        state = real(*arguments)
        torch.distributed.barrier()
        if rank == 0:
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        return state

    health_case.resume = resume_then_damage
    try:
        return train(rank, size, plan, root)
    finally:
        health_case.resume = real
