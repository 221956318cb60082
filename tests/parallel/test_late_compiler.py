"""Starting without torch's compiler: nothing else may change by it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.config.schema import MuonConfig, OptimizerConfig
from pretrain.optim.build import build_optimizer
from pretrain.parallel.late_compiler import compiled_at_first_call


def in_a_new_process(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_of_either_optimizer_loads_no_compiler() -> None:
    in_a_new_process("""
    import sys
    import torch
    from pretrain.config.schema import MuonConfig, OptimizerConfig
    from pretrain.optim.build import build_optimizer
    for config in (OptimizerConfig(), MuonConfig()):
        model = torch.nn.Linear(4, 4)
        optimizer = build_optimizer(model, config)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules
    """)


def test_engines_are_imported_without_compiler_and_tracker() -> None:
    in_a_new_process("""
    import sys
    from pretrain.engines.deepspeed_import import import_deepspeed
    from pretrain.parallel.megatron_import import import_megatron
    import_deepspeed("cpu")
    import_megatron("cpu")
    assert not {"torch._dynamo", "mlflow"} & set(sys.modules), "loaded"
    # What was left out is there for whoever asks for it.
    from deepspeed.autotuning.autotuner import Autotuner
    assert Autotuner.__name__ == "Autotuner"
    """)


@pytest.mark.parametrize("config", [OptimizerConfig(), MuonConfig()], ids=["adamw", "muon"])
def test_steps_are_those_of_torch_and_hooks_are_called_once(config: Any) -> None:
    torch.manual_seed(1)
    own = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    reference = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    reference.load_state_dict(own.state_dict())
    optimizer = build_optimizer(own, config)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    groups = [group for group in optimizer.param_groups if not group.get("is_muon")]
    names = {id(p): name for name, p in own.named_parameters()}
    others = dict(reference.named_parameters())
    expected = torch.optim.AdamW(
        [
            {"params": [others[names[id(p)]] for p in group["params"]], "weight_decay": group["weight_decay"]}
            for group in groups
        ],
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
    )
    for step in range(3):
        inputs = torch.randn(5, 6)
        for model in (own, reference):
            model.zero_grad()
            model(inputs).square().sum().backward()
        if isinstance(config, MuonConfig):  # the matrix goes its own way: same gradients for all the rest
            for name, p in own.named_parameters():
                others[name].grad = p.grad.clone() if p.grad is not None else None
        optimizer.step()
        expected.step()
        assert called == ["before", "after"] * (step + 1)
    stepped = {names[id(p)] for group in groups for p in group["params"]}
    assert stepped
    for name, p in own.named_parameters():
        if name in stepped:
            assert torch.equal(p, others[name]), name
    assert all(p.requires_grad for p in own.parameters())


@pytest.mark.parametrize("config", [OptimizerConfig(), MuonConfig()], ids=["adamw", "muon"])
def test_schedulers_of_torch_take_the_optimizer(config: Any) -> None:
    torch.manual_seed(1)
    scheduled, plain = nn.Linear(4, 4), nn.Linear(4, 4)
    plain.load_state_dict(scheduled.state_dict())
    optimizer, reference = build_optimizer(scheduled, config), build_optimizer(plain, config)
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler whose optimizer has not been stepped
        for step in range(3):
            for group in reference.param_groups:
                group["lr"] = config.learning_rate / (step + 1)
            for model, own in ((scheduled, optimizer), (plain, reference)):
                model.zero_grad()
                model(torch.ones(2, 4)).square().sum().backward()
                own.step()
            scheduler.step()
    assert called == ["after"] * 3
    assert torch.equal(scheduled.weight, plain.weight)
    assert torch.equal(scheduled.bias, plain.bias)


def test_what_is_compiled_is_compiled_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_now(model: Any, **options: Any) -> Any:
        if options.get("mode") == "impossible":
            raise RuntimeError("no compiler here")
        compiled.append((model.__name__, options))
        return lambda *args: ("compiled", model(*args))

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_at_first_call():

        @torch.compile(dynamic=True)
        def double(x: int) -> int:
            return 2 * x

        triple = torch.compile(lambda x: 3 * x)
        # What Megatron-Core and DeepSpeed do where there is no compiler is to take the function as it is.
        plain = torch.compile(lambda x: 5 * x, mode="impossible")
    assert torch.compile is compile_now
    assert compiled == []
    assert [double(2), double(3), triple(1)] == [("compiled", 4), ("compiled", 6), ("compiled", 3)]
    assert compiled == [("double", {"dynamic": True}), ("<lambda>", {})]
    assert plain(2) == 10


def test_an_optimizer_that_is_no_longer_used_is_freed_at_once() -> None:
    optimizer = build_optimizer(nn.Linear(3, 3), OptimizerConfig())
    seen = weakref.ref(optimizer)
    del optimizer
    assert seen() is None
