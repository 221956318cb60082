"""The offloaded AdamW among what else plain torch has: hooks, loss scaling, checkpoints, weights changed by others."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.device import Event, InlineDevice
from pretrain.optim.offload.optimizer import OffloadedAdamW
from pretrain.optim.offload.schedule import Kind, Operation, Place, Plan
from pretrain.optim.offload.simulated import SimulatedDevice

CONFIG = OffloadConfig(enabled=True, subgroup_size=16)


class Apart(InlineDevice):
    """A device that is not the host, as the executor sees it; ``log`` has what it was given. ``free``: bytes."""

    host_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.free: int | None = None

    def run(self, operation: Operation, waits: Any, work: Callable[[], None]) -> Event:
        self.log.append(f"{operation.kind.value} {operation.subgroup}")
        return super().run(operation, waits, work)

    def free_device_bytes(self) -> int | None:
        return self.free


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).to(dtype)


def backward(model: nn.Module, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    model(x).float().pow(2).mean().backward()


def all_cpu(count: int) -> Plan:
    every = tuple(range(count))
    return Plan((Place.CPU,) * count, (), every, num_slots=1, num_host_buffers=count, early_gradients=True)


def all_streamed(count: int, num_early: int = 0) -> Plan:
    return Plan((Place.STREAM,) * count, tuple(range(count)), (), num_slots=1, num_early=num_early)


def over(model: nn.Module, **options: Any) -> OffloadedAdamW:
    return OffloadedAdamW(model.parameters(), lr=1e-2, **{"offload": CONFIG, "watch": False, **options})


def values(model: nn.Module, optimizer: OffloadedAdamW) -> list[Tensor]:
    found = [p.detach().clone() for p in model.parameters()]
    for entry in optimizer.state_dict()["state"].values():
        found += [entry[name] for name in sorted(entry)]
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_weights_of_two_dtypes_do_not_depend_on_the_place(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def stepped(plan: Plan) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        device = SimulatedDevice(0)
        with device:
            parameters = []
            for dtype in dtypes:
                weight, gradient = (torch.randn(8, generator=generator).to(dtype) for _ in range(2))
                parameters.append(nn.Parameter(device.model_tensor(weight)))
                parameters[-1].grad = device.model_tensor(gradient)
            optimizer = OffloadedAdamW(parameters, lr=1e-2, offload=CONFIG, device=device, plan=plan)
            optimizer.step()
            found = [optimizer.states.read(n, s) for n in (0, 1) for s in ("master", "exp_avg", "exp_avg_sq")]
            device.settle()
            return found

    assert_equal(stepped(all_cpu(2)), stepped(all_streamed(2)))


def test_the_last_backward_pass_brings_state_as_memory_is_set_free() -> None:
    model, device = layers(), Apart()
    optimizer = over(model, device=device, plan=all_streamed(2, num_early=2))
    backward(model, 0)
    assert device.log == []
    device.free = 0
    optimizer.last_backward()
    assert device.log == ["prefetch 0"]  # into the ring; for the other there is no memory yet
    device.free = 10**9
    backward(model, 1)
    assert device.log == ["prefetch 0", "prefetch 1"]
    optimizer.step()
    steps = len(device.log)
    backward(model, 2)
    assert len(device.log) == steps


@pytest.mark.parametrize("early", [False, True])
def test_gradients_leave_in_the_last_backward_pass_when_asked_to(early: bool) -> None:
    model, device = layers(torch.bfloat16), Apart()
    optimizer = over(model, device=device, plan=all_cpu(2), early_gradients=early)
    other = layers(torch.bfloat16)
    reference = over(other)
    for step in range(3):
        device.log.clear()
        backward(model, 2 * step)
        assert device.log == []
        optimizer.last_backward()
        backward(model, 2 * step + 1)
        assert sorted(device.log) == [f"{Kind.GRADIENT_DOWN.value} {n}" for n in range(2) if early]
        optimizer.clip_grad_norm_(0.01)
        optimizer.step()
        assert sum(line.startswith(Kind.GRADIENT_DOWN.value) for line in device.log) == 2
        optimizer.zero_grad()
        for micro_batch in range(2):
            backward(other, 2 * step + micro_batch)
        reference.clip_grad_norm_(0.01)
        reference.step()
        reference.zero_grad()
    assert_equal(values(model, optimizer), values(other, reference))


def rescale(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.25)


def replace_one(model: nn.Module) -> None:
    first = next(model.parameters())
    assert first.grad is not None
    first.grad = first.grad * 3


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def add_more(model: nn.Module) -> None:
    backward(model, 77)


@pytest.mark.parametrize("rewrite", [rescale, replace_one, clip, add_more])
def test_a_gradient_that_was_rewritten_after_it_was_sent_is_sent_again(rewrite: Callable[[nn.Module], None]) -> None:
    found = []
    for early in (True, False):
        model = layers()
        optimizer = over(model, device=Apart(), plan=all_cpu(2), early_gradients=early)
        for step in range(2):
            optimizer.last_backward()
            backward(model, step)
            rewrite(model)
            if early:
                with pytest.warns(UserWarning, match="were rewritten after the backward pass"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        found.append(values(model, optimizer))
    assert_equal(*found)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_gradients_of_a_step_that_was_never_taken_are_not_those_of_the_next(clear: str) -> None:
    found = []
    for early in (True, False):
        model, device = layers(), Apart()
        optimizer = over(model, device=device, plan=all_cpu(2), early_gradients=early)
        for step in range(3):
            optimizer.last_backward()
            backward(model, step)
            optimizer.clip_grad_norm_(1e-3)
            if step != 1:
                optimizer.step()
            (optimizer if clear == "optimizer" else model).zero_grad()
            if step == 1 and clear == "optimizer":
                device.log.clear()
                backward(model, 9)  # of the next step, not the last one
                assert device.log == []
                optimizer.zero_grad()
        found.append(values(model, optimizer))
    assert_equal(*found)


def test_a_factor_of_a_step_that_was_never_taken_is_forgotten() -> None:
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = (OffloadedAdamW([p], offload=CONFIG) for p in (ours, theirs))
    ours.sum().backward()
    optimizer.clip_grad_norm_(1e-6)
    optimizer.zero_grad()
    for parameter, stepped in ((ours, optimizer), (theirs, other)):
        parameter.sum().backward()
        stepped.step()
    assert torch.equal(optimizer.states.read(0, "exp_avg"), other.states.read(0, "exp_avg"))


@pytest.mark.parametrize("unscale", [True, False])
def test_a_loss_scaler_drives_it(unscale: bool) -> None:
    """Scales are powers of two: the same bits as without; the second of four steps overflows. Gradients that were sent
    before they were unscaled are sent again."""
    model, plain = layers(), layers()
    optimizer = over(model, device=Apart(), plan=all_cpu(2), early_gradients=not unscale)
    reference = over(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.last_backward()
        scaler.scale(model(x).sum() * (torch.inf if step == 1 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 1:
            plain(x).sum().backward()
            if unscale:
                reference.clip_grad_norm_(0.1)
            reference.step()
            reference.zero_grad()
    assert scaler.get_scale() == 512.0
    assert_equal(values(model, optimizer), values(plain, reference))


def test_unscaled_gradients_are_sent_again() -> None:
    found = []
    for early in (True, False):
        model = layers()
        optimizer = over(model, device=Apart(), plan=all_cpu(2), early_gradients=early)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.last_backward()
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        scaler.unscale_(optimizer)
        if early:
            with pytest.warns(UserWarning, match="leave out unscale_"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        found.append(values(model, optimizer))
    assert_equal(*found)


def _early_among_ranks(rank: int, size: int) -> str:
    with pytest.raises(ValueError, match="early_gradients=True with 2 ranks") as caught:
        over(layers(), early_gradients=True)
    return f"{caught.value}"


def test_early_gradients_are_refused_among_ranks(worker_pools: Any) -> None:
    assert len(worker_pools(2).run(_early_among_ranks)) == 2


def test_hooks_do_not_keep_it_alive() -> None:
    model = layers()
    optimizer = over(model)
    optimizer.last_backward()
    backward(model, 0)
    optimizer.step()
    gone = weakref.ref(optimizer.states)
    del optimizer
    gc.collect()
    assert gone() is None
    backward(model, 1)
    copy.deepcopy(model)


def test_a_device_that_tells_times_is_watched() -> None:
    model = layers()
    optimizer = over(model, device=Apart(), plan=all_cpu(2), watch=True)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    report = optimizer.report()
    assert report["offload/fraction"] == 0.0
    assert report["offload/update_s"] >= 0
    model = layers()
    assert over(model, device=Apart(), plan=all_cpu(2)).report() == {}
    assert over(model, watch=True).report() == {}  # the host's plan does not change


@pytest.mark.parametrize(("full", "flat"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("steps", [0, 3])
def test_distributed_checkpoints_state_goes_around(steps: int, full: bool, flat: bool) -> None:
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat)

    def trained(model: nn.Module, optimizer: OffloadedAdamW, first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return values(model, optimizer)

    model = layers(torch.bfloat16)
    optimizer = over(model)
    before = trained(model, optimizer, 0, steps)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert_equal(values(model, optimizer), before)
    again = layers(torch.bfloat16)
    again.load_state_dict(model.state_dict())
    other = over(again, offload=replace(CONFIG, subgroup_size=7, fraction=0.5))
    set_optimizer_state_dict(again, other, saved, options=options)
    assert_equal(values(again, other), before)
    assert_equal(trained(again, other, steps, steps + 2), trained(model, optimizer, steps, steps + 2))


def test_state_can_be_looked_at() -> None:
    model = layers(torch.bfloat16)
    optimizer = over(model)
    backward(model, 0)
    optimizer.step()
    first = next(model.parameters())
    entry = optimizer.state[first]
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "master"]
    assert entry["step"] == 1
    assert torch.equal(entry["master"].to(torch.bfloat16), first)
    assert torch.equal(entry["exp_avg"].view(-1), optimizer.states.read(0, "exp_avg"))
    assert "momentum_buffer" not in entry
    assert type(copy.deepcopy(entry)) is dict


def test_copies_are_refused() -> None:
    optimizer = over(layers())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save state_dict\(\)"):
            copied(optimizer)


def test_weights_in_other_memory_are_refused() -> None:
    model = layers()
    optimizer = over(model)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())
    backward(model, 0)
    for call in (optimizer.step, optimizer.take_weights):
        with pytest.raises(RuntimeError, match="parameters 0, 1 lie in other memory"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_others_changed_are_taken_or_refused(dtype: torch.dtype) -> None:
    model = layers(dtype)
    optimizer = over(model, device=Apart(), plan=all_streamed(2, num_early=2))
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    loaded = {name: value * 2 + 1 for name, value in model.state_dict().items()}
    optimizer.last_backward()  # what comes early must not be what was before
    model.load_state_dict(loaded)
    backward(model, 2)
    with pytest.raises(RuntimeError, match=r"parameters 0, 1 were changed by others.*take_weights"):
        optimizer.step()
    optimizer.take_weights()
    for number, value in enumerate(loaded.values()):
        assert torch.equal(optimizer.states.read(number, "master"), value.float().view(-1))
    optimizer.step()
    for parameter, value in zip(model.parameters(), loaded.values(), strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0.05)


def test_equal_weights_and_fp32_ones_raise_no_alarm() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = layers(dtype)
        optimizer = over(model)
        for step in range(2):
            backward(model, step)
            optimizer.step()
            same = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model.load_state_dict(same)
    with torch.no_grad():
        next(model.parameters()).fill_(0.5)
    backward(model, 2)
    optimizer.step()  # FP32 weights are the masters themselves


def _wrapped_afterwards(rank: int, size: int) -> list[Tensor]:
    model = layers(torch.bfloat16)
    optimizer = over(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(2):
        backward(wrapped, step)
        optimizer.step()
        optimizer.zero_grad()
    return values(model, optimizer)


def test_a_broadcast_of_equal_weights_raises_no_alarm(worker_pools: Any) -> None:
    one, other = worker_pools(2).run(_wrapped_afterwards)
    assert_equal(one, other)


def test_a_graph_of_old_weights_is_not_used_with_new_ones() -> None:
    model = layers()
    optimizer = over(model)
    loss = model(torch.ones(2, 4)).pow(2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torchs_state_of_a_parameter_that_was_never_used() -> None:
    ours = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs = torch.optim.AdamW(ours)
    ours[0].sum().backward()
    theirs.step()
    optimizer = OffloadedAdamW(ours, offload=CONFIG)
    for parameter in ours:
        parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert torch.equal(optimizer.state[ours[0]]["exp_avg"], theirs.state[ours[0]]["exp_avg"])
    assert torch.equal(optimizer.states.read(1, "exp_avg_sq"), torch.zeros(3))
    theirs.step()
    theirs.state[ours[1]]["step"] -= 1
    with pytest.raises(ValueError, match=r"parameters are at steps \[0\.0, 2\.0\]"):
        optimizer.load_state_dict(theirs.state_dict())


def test_early_state_is_not_used_after_loading() -> None:
    model = layers()
    optimizer = over(model, device=Apart(), plan=all_streamed(2, num_early=2))
    backward(model, 0)
    optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    found = []
    for _ in range(2):
        optimizer.last_backward()
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.step()
        found.append(values(model, optimizer))
    assert_equal(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maximize": True, "amsgrad": True}, r"maximize of group 0 is true[^$]*\namsgrad of group 0 is true"),
        ({"decoupled_weight_decay": False}, "that of Adam"),
        ({"lr": -1.0}, "lr of group 0 is -1.0"),
    ],
)
def test_state_of_another_update_is_refused(changes: dict[str, Any], message: str) -> None:
    optimizer = over(layers())
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(changes)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not changes.keys() & optimizer.param_groups[0].keys() - {"lr"}
    assert optimizer.param_groups[0]["lr"] == 1e-2
    momentum = torch.optim.SGD(layers().parameters(), momentum=0.9).state_dict()
    with pytest.raises(ValueError, match="group 0 lacks betas, eps"):
        optimizer.load_state_dict(momentum)


def test_impossible_settings_are_all_named() -> None:
    with pytest.raises(ValueError) as caught:
        OffloadedAdamW([nn.Parameter(torch.ones(4, 3).t())], lr=-1.0, betas=(1.0, -0.1), eps=-1e-8, weight_decay=-0.1)
    assert f"{caught.value}".splitlines() == [
        "lr of group 0 is -1.0, expected 0 or more",
        "eps of group 0 is -1e-08, expected 0 or more",
        "weight_decay of group 0 is -0.1, expected 0 or more",
        "betas of group 0 are (1.0, -0.1), expected two from 0 up to, but not, 1",
        "parameter 0 of shape (3, 4) is not contiguous in memory, expected that of a whole tensor: make it "
        "parameter.data = parameter.data.contiguous() first",
    ]
    with pytest.raises(ValueError, match="no parameter in any group"):
        OffloadedAdamW([{"params": []}])
    with pytest.raises(ValueError, match="empty parameter list"):
        OffloadedAdamW([])
    with pytest.raises(ValueError, match=r"is torch\.float64, expected"):
        OffloadedAdamW([nn.Parameter(torch.ones(3, dtype=torch.float64))])
