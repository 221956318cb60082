"""Optimizer states offloaded under DeepSpeed's ZeRO 1, 2 and 3: the same training, wherever they lie."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from support.engine_case import NUM_STEPS, Case, joined, loss_function, rate, run_steps, samples, torch_reference
from support.matrix import rotating
from support.offload_engine_case import OffloadCase, build, device_of, differing, exported
from torch import nn

from pretrain.config.schema import OffloadConfig

pytestmark = pytest.mark.distributed

CLASSES = {1: "OffloadedStages1And2", 2: "OffloadedStages1And2", 3: "OffloadedStage3"}
RESIDENT = OffloadConfig(enabled=True, resident_fraction=1.0, subgroup_size=10**6)
"""Nothing is offloaded: the same arithmetic in one place."""
PLANS = {
    "cpu": OffloadConfig(enabled=True, subgroup_size=64),
    "ragged": OffloadConfig(enabled=True, subgroup_size=37, fraction=0.3),
    "streamed": OffloadConfig(enabled=True, subgroup_size=50, fraction=1.0),
    "mixed": OffloadConfig(enabled=True, subgroup_size=23, fraction=0.6, resident_fraction=0.3),
    "in turn": OffloadConfig(enabled=True, subgroup_size=40, fraction=0.5, overlap=False),
    "low bits": OffloadConfig(enabled=True, subgroup_size=31, fraction=0.5, master="low_bits"),
}


def train(rank: int, size: int, case: Case, tied: bool = False) -> tuple[Any, ...]:
    engine = build(case, tied)
    results = run_steps(engine, rank, case, range(NUM_STEPS))
    return results, exported(engine), type(engine._engine.optimizer).__name__, engine.scalar_state()


@pytest.mark.parametrize(("size", "precision"), list(product((1, 2), ("fp32", "bf16"))))
def test_zero_3_trains_as_with_deepspeeds_own_offload(worker_pools: Any, size: int, precision: str) -> None:
    stock = Case(3, size, precision=precision, offload_optimizer=True)
    ours = OffloadCase(3, size, precision=precision, offload=PLANS["ragged"])
    expected, found = (worker_pools(size).run(train, case) for case in (stock, ours))
    first, second = (joined([rank[0] for rank in ranks]) for ranks in (expected, found))
    assert second.losses == pytest.approx(first.losses, rel=2e-6 if precision == "fp32" else 2e-5)
    assert second.norms == pytest.approx(first.norms, rel=2e-5 if precision == "fp32" else 2e-3)
    for (_, one, _, _), (_, two, name, scalars) in zip(expected, found, strict=True):
        assert name == "OffloadedStage3"
        assert scalars == {"step": float(NUM_STEPS)}
        assert one.keys() == two.keys()
        for key, values in one.items():
            torch.testing.assert_close(two[key], values, rtol=1e-4, atol=2e-6 if precision == "fp32" else 2e-4)


@pytest.mark.parametrize(("stage", "tied"), [(1, False), (2, False), (3, False), (3, True)])
def test_it_trains_like_plain_torch(worker_pools: Any, stage: int, tied: bool) -> None:
    ranks = worker_pools(2).run(train, OffloadCase(stage, 2, offload=PLANS["mixed"], device="late"), tied)
    found, reference = joined([rank[0] for rank in ranks]), torch_reference(tied=tied)
    assert found.losses == pytest.approx(reference.losses, rel=2e-6)
    assert found.norms == pytest.approx(reference.norms, rel=2e-5)
    assert {rank[2] for rank in ranks} == {CLASSES[stage]}


MATRIX = [
    case
    for case in product((1, 2, 3), (1, 2), ("fp32", "bf16"), PLANS, ("host", "prompt", "late"))
    if not (case[2] == "fp32" and case[3] == "low bits")
]
MUST = [
    (1, 2, "bf16", "mixed", "late"),
    (2, 2, "bf16", "low bits", "prompt"),
    (2, 2, "bf16", "cpu", "late"),
    (3, 2, "bf16", "low bits", "late"),
    (3, 2, "fp32", "ragged", "prompt"),
]


@pytest.mark.parametrize(("stage", "size", "precision", "plan", "device"), rotating(MATRIX, 10, MUST))
def test_any_plan_gives_the_bits_of_no_offloading(
    worker_pools: Any, stage: int, size: int, precision: str, plan: str, device: str
) -> None:
    # Every rank has two micro-batches a step; at stage 3 DeepSpeed has several sub-groups.
    layout = {"precision": precision, "clip": 0.5 if stage != 2 else None, "overlap": stage == 2}
    layout |= {"sub_group_size": 64} if stage == 3 else {}
    base = OffloadCase(stage, size, offload=RESIDENT, **layout)  # type: ignore[arg-type]
    expected = worker_pools(size).run(train, base)
    found = worker_pools(size).run(train, replace(base, offload=PLANS[plan], device=device))
    for (results, state, _, _), (others, other_state, _, _) in zip(expected, found, strict=True):
        assert results == others
        assert differing(state, other_state) == []


def drop_steps(rank: int, size: int, case: OffloadCase) -> tuple[Any, ...]:
    """Two steps that count; in between steps that are refused, and some that are not finite."""
    never = build(case)
    plain = run_steps(never, rank, case, range(2))
    engine = build(case)
    asked: list[float] = []

    def step(data: int, answer: bool | None, factor: float = 1.0) -> float:
        batch = samples(data)
        starts = range(case.micro_batch * rank, 8, case.micro_batch * size)
        rows = [{n: v[s : s + case.micro_batch] for n, v in batch.items()} for s in starts]

        def loss(model: Any, part: Any) -> Any:
            output = loss_function(model, part)
            return replace(output, loss_sum=output.loss_sum * factor)

        def accept(result: Any) -> bool:
            asked.append(result.grad_norm)
            return bool(answer)

        question = None if answer is None else accept
        return engine.train_step(rows, loss, float(batch["mask"].sum()), rate(data), question).grad_norm

    before = exported(engine)
    step(5, False, 30.0)
    step(6, None, float("nan"))
    untouched = differing(before, exported(engine))
    step(0, True)
    step(7, False, float("inf"))
    step(1, None)
    return plain, untouched, differing(exported(never), exported(engine)), engine.scalar_state(), len(asked)


@pytest.mark.parametrize(
    "case",
    [
        OffloadCase(1, 2, offload=PLANS["mixed"], device="late"),
        OffloadCase(2, 2, precision="bf16", offload=PLANS["low bits"], device="prompt"),
        OffloadCase(3, 2, precision="bf16", offload=PLANS["mixed"], device="late"),
        OffloadCase(3, 2, offload=PLANS["streamed"]),
    ],
    ids=lambda case: f"zero{case.stage}-{case.precision}-{case.device}",
)
def test_a_dropped_step_leaves_no_trace(worker_pools: Any, case: OffloadCase) -> None:
    for _, untouched, differs, scalars, asked in worker_pools(2).run(drop_steps, case):
        assert untouched == []
        assert differs == []
        assert scalars == {"step": 2.0}
        assert asked == 3


def told(rank: int, size: int, case: OffloadCase) -> tuple[int, list[list[int]]]:
    """How many targets there are, and which were told to be ready in each step; state starts early once in each."""
    engine = build(case)
    states = engine.offload.states
    steps: list[list[int]] = []
    ready, update = states.gradient_ready, states.update

    def recording_ready(target: int, gradient: torch.Tensor) -> None:
        assert gradient.shape == engine.offload.pieces[target].weight.shape
        steps[-1].append(target)
        ready(target, gradient)

    def recording_update(*args: Any) -> None:
        update(*args)
        steps.append([])

    states.gradient_ready, states.update = recording_ready, recording_update
    early: list[int] = []
    states.start_early = lambda: early.append(len(steps))
    steps.append([])
    run_steps(engine, rank, case, range(3))
    assert early == [1, 2, 3]
    return len(engine.offload.pieces), steps[:-1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_leave_during_the_last_backward_pass(worker_pools: Any, stage: int) -> None:
    case = OffloadCase(stage, 2, precision="bf16", offload=PLANS["cpu"], device="late")
    for count, steps in worker_pools(2).run(told, case):
        assert len(steps) == 3
        assert [sorted(targets) for targets in steps] == [list(range(count))] * 3
    # Without overlap none does.
    case = replace(case, offload=PLANS["in turn"])
    for _, steps in worker_pools(2).run(told, case):
        assert steps == [[], [], []]


class Narrow(nn.Module):
    """One parameter of 5 elements: the last of 4 ranks has none of it at stage 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.only = nn.Linear(5, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


def train_narrow(rank: int, size: int, case: Case) -> tuple[int, torch.Tensor]:
    from support.engine_case import Output

    from pretrain.engines.deepspeed import DeepSpeedEngine

    with device_of(case):
        engine = DeepSpeedEngine(Narrow(), case.config(), torch.device("cpu"))

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> Output:
        return Output(model(batch["x"]).square().sum(), {})

    for step in range(3):
        x = torch.randn(1, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        engine.train_step([{"x": x}], loss, 4.0, 1e-2)
    parts = [f.values for f in engine.export_state() if f.slot == "master"]
    return len(engine.offload.pieces), torch.cat([torch.empty(0), *parts])


def test_a_rank_without_any_element_takes_part(worker_pools: Any) -> None:
    case = OffloadCase(3, 4, offload=PLANS["cpu"], threshold=0)
    found = worker_pools(4).run(train_narrow, case)
    assert [count for count, _ in found] == [1, 1, 1, 0]
    model = Narrow()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.cat([torch.randn(1, 5, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(4)])
        (model(x).square().sum() / 4.0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
    torch.testing.assert_close(torch.cat([v for _, v in found]), model.only.weight.detach().view(-1))


def kinds_of_partitions(rank: int, size: int, case: Case) -> set[str]:
    zero = build(case)._engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    held = [tensor for name in names for tensor in getattr(zero, name, ())]
    assert not zero.optimizer.state
    return {tensor.device.type for tensor in held}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_keeps_no_masters(worker_pools: Any, stage: int) -> None:
    assert worker_pools(1).run(kinds_of_partitions, OffloadCase(stage, precision="bf16"))[0] == {"meta"}
    assert worker_pools(1).run(kinds_of_partitions, Case(stage if stage > 1 else 2, precision="bf16"))[0] == {"cpu"}
