"""torch's compiler, loaded when something is compiled and not before.

Its import takes about 3 s of every rank's processor time (``python -X importtime -c 'import torch._dynamo'``), at each
start and restart. Two things ask for it though nothing is compiled: torch's optimizers, which mark what they do as no
part of a compiled graph, and both engines, which compile functions of their own (DeepSpeed of its Muon, Megatron-Core
fused ones) while they are imported. All that waits here. What is compiled later is compiled as ever; only an
optimizer's step within a compiled function is not foreseen, and nothing of this platform has one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

_OUTSIDE_GRAPHS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def optimizers_without_compiler() -> None:
    """Lets optimizers be made, saved and loaded without the compiler; harmless when repeated.

    ``torch._disable_dynamo`` takes the wrapped function's ``__dynamo_disable`` and makes it, with the compiler, where
    there is none. A torch that does it otherwise loads the compiler as ever.
    """
    for name in _OUTSIDE_GRAPHS:
        own = getattr(getattr(Optimizer, name, None), "__wrapped__", None)
        if own is not None:
            own.__dict__.setdefault("__dynamo_disable", own)


def step_without_compiler(optimizer_class: type[Optimizer]) -> Callable[..., Any]:
    """The ``step`` of torch's ``optimizer_class`` less its marks for the compiler, and less hooks and profiling, which
    torch puts round the step of an instance's own class. For instances that are not ``differentiable``."""
    return torch.no_grad()(inspect.unwrap(optimizer_class.step))


@contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """``torch.compile`` within returns functions that are compiled when they are first called."""
    compile_now = torch.compile

    def later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(later, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(model)
        def function(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return model(*args, **kwargs)  # part of a graph that someone else compiles
            if not compiled:
                try:
                    compiled.append(compile_now(model, **options))
                except RuntimeError:  # this Python, or system, has no compiler: engines then take the plain function
                    compiled.append(model)
            return compiled[0](*args, **kwargs)

        return function

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = compile_now
