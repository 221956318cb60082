"""AdamW with offloaded state as a torch optimizer: the same bits by any plan, torch's AdamW within a tolerance."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import InlineDevice
from pretrain.optim.offload.optimizer import OffloadedAdamW
from pretrain.optim.offload.schedule import Place, Plan
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups

STEPS = 50
SKIPPED = 7
"""Number of the step whose gradients overflow."""
WHOLE = OffloadConfig(enabled=True, subgroup_size=10**6)


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5, bias=False)]
    return nn.Sequential(*layers).to(dtype)


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_over(
    model: nn.Module, offload: OffloadConfig, plan: Plan | None = None, threads: int | None = None
) -> OffloadedAdamW:
    device = InlineDevice(threads) if threads else None
    return OffloadedAdamW(groups_of(model), lr=1e-2, weight_decay=0.1, offload=offload, plan=plan, device=device)


def train(model: nn.Module, optimizer: OffloadedAdamW, first: int, last: int) -> None:
    """Two micro-batches a step, clipped; one step overflows."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for micro_batch in range(2):
            if micro_batch:
                optimizer.last_backward()
            x = torch.randn(6, 7, generator=generator).to(dtype)
            model(x).float().pow(2).mean().backward()
        if step == SKIPPED:
            next(model.parameters()).grad.mul_(torch.inf)  # type: ignore[union-attr]
        norm = optimizer.clip_grad_norm_(0.1)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            optimizer.skip_step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: OffloadedAdamW) -> list[Tensor]:
    values = [p.detach().clone() for p in model.parameters()]
    for entry in optimizer.state_dict()["state"].values():
        values += [entry[name] for name in sorted(entry)]
    return values


def trained(dtype: torch.dtype, offload: OffloadConfig, threads: int | None = None) -> list[Tensor]:
    model = model_of(dtype)
    optimizer = optimizer_over(model, offload, threads=threads)
    train(model, optimizer, 0, STEPS)
    return state_of(model, optimizer)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


REFERENCES: dict[torch.dtype, list[Tensor]] = {}


def reference(dtype: torch.dtype) -> list[Tensor]:
    """All in one subgroup, updated by the CPU where it is."""
    if dtype not in REFERENCES:
        REFERENCES[dtype] = trained(dtype, WHOLE)
    return REFERENCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "offload",
    [
        replace(WHOLE, subgroup_size=17, fraction=0.5),
        replace(WHOLE, subgroup_size=1, fraction=0.1),
        replace(WHOLE, subgroup_size=33, fraction=1.0),
        replace(WHOLE, subgroup_size=50, fraction=0.75, overlap=False),
        replace(WHOLE, subgroup_size=64, fraction=0.3, resident_fraction=0.4),
        replace(WHOLE, subgroup_size=100, resident_fraction=1.0),
        replace(WHOLE, subgroup_size=10**9, fraction=1.0),
    ],
    ids=lambda o: f"{o.subgroup_size}-{o.fraction}-{o.resident_fraction}",
)
def test_no_fraction_and_no_size_changes_a_bit(offload: OffloadConfig, dtype: torch.dtype) -> None:
    assert_equal(trained(dtype, offload), reference(dtype))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_low_bits_of_masters_are_enough(fraction: float) -> None:
    offload = replace(WHOLE, subgroup_size=40, fraction=fraction, master="low_bits")
    assert_equal(trained(torch.bfloat16, offload), reference(torch.bfloat16))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_number_of_threads_changes_a_bit(threads: int) -> None:
    assert_equal(trained(torch.bfloat16, replace(WHOLE, subgroup_size=101), threads), reference(torch.bfloat16))


def test_two_plans_differ_in_what_they_hold_where() -> None:
    """Otherwise the equalities above would say little."""
    one = optimizer_over(model_of(torch.bfloat16), replace(WHOLE, subgroup_size=32, fraction=0.5)).states
    other = optimizer_over(model_of(torch.bfloat16), replace(WHOLE, subgroup_size=32, resident_fraction=1.0)).states
    assert {Place.CPU, Place.STREAM} == set(one.plan.places)
    assert {Place.RESIDENT} == set(other.plan.places)
    assert one.plan.num_early == one.plan.num_slots == 3


def sizes_of(model: nn.Module, size: int) -> tuple[Subgroup, ...]:
    groups = groups_of(model)
    targets = [Target(p.numel(), n) for n, group in enumerate(groups) for p in group["params"]]  # type: ignore[attr-defined]
    return cut_subgroups(targets, size)


@st.composite
def plans(draw: st.DrawFn, count: int) -> Plan:
    places = tuple(draw(st.lists(st.sampled_from(list(Place)), min_size=count, max_size=count)))
    device = draw(st.permutations([i for i in range(count) if places[i] is not Place.CPU]))
    cpu = draw(st.permutations([i for i in range(count) if places[i] is Place.CPU]))
    streamed = sum(place is Place.STREAM for place in places)
    return Plan(
        places,
        tuple(device),
        tuple(cpu),
        num_slots=draw(st.integers(1, 4)),
        num_early=draw(st.integers(0, streamed)),
        num_host_buffers=draw(st.integers(1, 3)),
        early_gradients=draw(st.booleans()),
    )


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_no_order_and_no_change_of_plan_changes_a_bit(data: st.DataObject) -> None:
    model = model_of(torch.bfloat16)
    size = data.draw(st.integers(20, 120))
    subgroups = sizes_of(model, size)
    master = data.draw(st.sampled_from(["full", "low_bits"]))
    offload = replace(WHOLE, subgroup_size=size, master=master)
    optimizer = optimizer_over(model, offload, data.draw(plans(len(subgroups))))
    stops = [0, *sorted(data.draw(st.sets(st.integers(1, STEPS - 1), max_size=3))), STEPS]
    for first, last in pairwise(stops):
        train(model, optimizer, first, last)
        optimizer.states.replan(data.draw(plans(len(subgroups))))
    assert_equal(state_of(model, optimizer), reference(torch.bfloat16))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_run_resumes_under_another_plan(data: st.DataObject) -> None:
    stop = data.draw(st.integers(1, STEPS - 1))
    choices = [
        replace(WHOLE, subgroup_size=data.draw(st.integers(8, 400)), fraction=data.draw(st.floats(0, 1)), master=master)
        for master in data.draw(st.permutations(["full", "low_bits"]))
    ]
    model = model_of(torch.bfloat16)
    optimizer = optimizer_over(model, choices[0])
    train(model, optimizer, 0, stop)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model = model_of(torch.bfloat16)
    model.load_state_dict(weights)
    optimizer = optimizer_over(model, choices[1])
    optimizer.load_state_dict(state)
    train(model, optimizer, stop, STEPS)
    assert_equal(state_of(model, optimizer), reference(torch.bfloat16))


def test_torchs_adamw_within_rounding() -> None:
    """Over 50 steps in FP32 the two orders of operations stay within 2e-6 of the weights' size."""
    ours, theirs = model_of(torch.float32), model_of(torch.float32)
    optimizer = optimizer_over(ours, replace(WHOLE, subgroup_size=60, fraction=0.5))
    other = torch.optim.AdamW(groups_of(theirs), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    for step in range(STEPS):
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        for model, stepped in ((ours, optimizer), (theirs, other)):
            model(x).sin().mean().backward()
            stepped.step()
            stepped.zero_grad()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


def test_state_goes_to_and_from_torchs_adamw() -> None:
    ours, theirs = model_of(torch.float32), model_of(torch.float32)
    other = torch.optim.AdamW(groups_of(theirs), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        theirs(torch.randn(6, 7, generator=torch.Generator().manual_seed(step))).sin().mean().backward()
        other.step()
        other.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    optimizer = optimizer_over(ours, replace(WHOLE, subgroup_size=60, fraction=0.5))
    optimizer.load_state_dict(other.state_dict())
    back = torch.optim.AdamW(groups_of(ours), lr=1e-2, weight_decay=0.1)
    back.load_state_dict(optimizer.state_dict())
    for group, same in zip(other.param_groups, back.param_groups, strict=True):
        for one, two in zip(group["params"], same["params"], strict=True):
            for slot in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(other.state[one][slot], back.state[two][slot])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    for fraction in (0.0, 1.0):
        used, unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
        offload = replace(WHOLE, subgroup_size=4, fraction=fraction)
        optimizer = OffloadedAdamW([used, unused], weight_decay=0.5, offload=offload)
        used.sum().backward()
        optimizer.step()
        assert not torch.equal(used, torch.ones(5))
        assert torch.equal(unused, torch.ones(7))
        assert torch.equal(optimizer.states.read(1, "exp_avg"), torch.zeros(7))


def test_a_failed_update_leaves_nothing_to_save() -> None:
    class Failing(InlineDevice):
        def adamw_(self, *args: object, **kwargs: object) -> None:
            raise MemoryError("no more")

    parameter = nn.Parameter(torch.ones(5))
    optimizer = OffloadedAdamW([parameter], offload=WHOLE, device=Failing())
    parameter.sum().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    with pytest.raises(RuntimeError, match="resume from the last checkpoint"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()


def test_what_does_not_fit_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = OffloadedAdamW([parameter], offload=WHOLE)
    with pytest.raises(ValueError, match="construct a new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, expected \[1\]"):
        optimizer.load_state_dict(OffloadedAdamW([nn.Parameter(torch.ones(1)) for _ in range(2)]).state_dict())
    with pytest.raises(ValueError, match="not contiguous"):
        OffloadedAdamW([nn.Parameter(torch.ones(4, 3).t())])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {0: {"step": 1.0, "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)}}
    with pytest.raises(ValueError, match="exp_avg of parameter 0 has 5 elements, expected 12"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="subgroup_size is 0"):
        OffloadedAdamW([parameter], offload=replace(WHOLE, subgroup_size=0))
    with pytest.raises(ValueError, match="host memory"):
        OffloadedAdamW([parameter], offload=replace(WHOLE, host_memory_gib=1e-9))


def test_a_learning_rate_scheduler_drives_it() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OffloadedAdamW([parameter], lr=1.0, weight_decay=0.0, offload=WHOLE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        moved.append(float((before - parameter.detach()).mean()))
    assert moved == pytest.approx([1.0, 0.5, 0.25], rel=1e-4)


def _data_parallel(rank: int, size: int, fraction: float) -> list[Tensor]:
    model = model_of(torch.float32)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_over(model, replace(WHOLE, subgroup_size=64, fraction=fraction))
    for step in range(5):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        mine = x.chunk(size)[rank]
        optimizer.last_backward()
        wrapped(mine).pow(2).mean().backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)


def test_data_parallel_ranks_agree_and_equal_one_process(worker_pools: Any) -> None:
    half, whole = (worker_pools(2).run(_data_parallel, fraction) for fraction in (0.5, 1.0))
    for states in (half, whole):
        assert_equal(states[0], states[1])
    assert_equal(half[0], whole[0])
    (alone,) = worker_pools(1).run(_data_parallel, 0.0)
    for one, two in zip(half[0], alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
