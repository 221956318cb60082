"""What offloaded optimizer state rests on inside Megatron-Core beyond its public interface, checked where it is used.

The versions are those of :data:`pretrain.parallel.megatron_import.KNOWN_VERSIONS`, which importing Megatron checks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any, Final

from pretrain.parallel.megatron_import import KNOWN_VERSIONS

MASTERS_OUTSIDE: Final = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"
"""Flag of Megatron's ``OptimizerConfig``: the inner optimizer holds masters and reads :data:`GRADIENT_OF_SHARD`."""
GRADIENT_OF_SHARD: Final = "decoupled_grad"

METHODS: Final[dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]]] = {
    "optimizer_config.OptimizerConfig": {"__post_init__": ((), (MASTERS_OUTSIDE,))},
    "distrib_optimizer.DistributedOptimizer": {
        "_build_model_and_main_param_groups": (
            ("gbuf_ranges", "param_gbuf_map", "opt_group_ranges", "config"),
            (MASTERS_OUTSIDE, "shard_float16_params_this_group", "main_param"),
        ),
        "_copy_model_grads_to_main_grads": ((), (MASTERS_OUTSIDE, GRADIENT_OF_SHARD, "shard_float16_groups")),
        "_copy_main_params_to_model_params": ((), (MASTERS_OUTSIDE,)),
        "_get_model_param_range_map": (("param",), ()),
        "zero_grad": (("set_to_none",), (MASTERS_OUTSIDE,)),
        "step_with_ready_grads": ((), ("start_param_sync",)),
    },
    "optimizer.MixedPrecisionOptimizer": {
        "prepare_grads": ((), ("_copy_model_grads_to_main_grads",)),
        "step_with_ready_grads": ((), ("optimizer", "step", "_copy_main_params_to_model_params")),
    },
    "optimizer.MegatronOptimizer": {
        "get_main_grads_for_grad_norm": ((), (MASTERS_OUTSIDE, GRADIENT_OF_SHARD)),
        "get_grad_norm": ((), ("get_main_grads_for_grad_norm",)),
    },
}
"""By class of ``megatron.core.optimizer`` and method: its parameters, and names that its code must have."""


def require_contract() -> None:
    """Refuse a Megatron-Core whose distributed optimizer works in another way.

    Raises:
        RuntimeError: all that differs.
    """
    if found := list(contract_violations()):
        raise unknown_megatron("; ".join(found))


def contract_violations() -> Iterator[str]:
    """What the installed, imported Megatron-Core does not have as it is needed."""
    for path, methods in METHODS.items():
        module, _, name = path.partition(".")
        owner: Any = getattr(importlib.import_module(f"megatron.core.optimizer.{module}"), name)
        for method, (parameters, names) in methods.items():
            function = inspect.unwrap(getattr(owner, method, None) or _missing)
            if function is _missing:
                yield f"{name} has no {method}"
                continue
            function = getattr(function, "__func__", function)
            has = tuple(inspect.signature(function).parameters)[1:]
            if has != parameters:
                yield f"{name}.{method} takes ({', '.join(has)}), expected ({', '.join(parameters)})"
            if lost := [n for n in names if n not in _names(function.__code__)]:
                yield f"{name}.{method} has nothing of {', '.join(lost)}"


def unknown_megatron(found: str) -> RuntimeError:
    """The error that says what was ``found`` to be different."""
    return RuntimeError(
        f"optimizer.offload was tested with megatron-core {', '.join(KNOWN_VERSIONS)}; of the installed one {found}; "
        f"pip install megatron-core=={KNOWN_VERSIONS[-1]}, or set optimizer.offload.enabled=false"
    )


def _missing() -> None:
    """Stands for a method that is not there."""


def _names(code: CodeType) -> set[str]:
    """Names, variables and strings of the code and of functions within."""
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, CodeType):
            names |= _names(constant)
    return names
