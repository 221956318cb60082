"""Megatron-Core on a host without CUDA: the places that name the device are turned to the CPU.

Megatron-Core 0.16 writes ``device="cuda"``, asks ``torch.cuda.current_device()`` and compares ``tensor.type()`` with
``"torch.cuda.FloatTensor"``. None of this is a setting. :func:`adapt` does three things, inside the loaded
``megatron.core`` modules only; ``torch`` itself stays as it is:

- string constants in the byte code of their functions are replaced (:data:`CONSTANTS`),
- their global ``torch`` becomes a stand-in whose ``cuda`` answers for a host with one CPU "device", and
- weights of several data types that are gathered together are gathered by type (:func:`_gathering_by_dtype`).

Never imported where CUDA exists.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d

from pretrain.parallel.megatron_import import check_version

CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_PACKAGES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.transformer.module",
    "megatron.core.utils",
)
# What must have been found, or the version is not what it says: (module, name of the function, constant).
_EXPECTED = (
    ("megatron.core.pipeline_parallel.schedules", "forward_backward_no_pipelining", "cuda"),
    ("megatron.core.optimizer.clip_grads", "get_grad_norm_fp32", "cuda"),
    ("megatron.core.optimizer.distrib_optimizer", "_build_model_and_main_param_groups", "torch.cuda.FloatTensor"),
)


class _Cuda(types.ModuleType):
    """``torch.cuda`` of a host whose only device is the CPU; names not adapted here are torch's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: Any) -> None:
        """CPU operations are complete when they return."""

    @staticmethod
    def empty_cache() -> None:
        """Host memory has no such cache."""


class _Torch(types.ModuleType):
    """``torch`` with another ``cuda``."""

    cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def adapt() -> None:
    """Adapt every loaded ``megatron.core`` module that the engine runs; may be called again.

    Raises:
        MegatronVersionError: the version is unknown.
        RuntimeError: CUDA exists here, or the modules lack a place that this version is known to have.
    """
    check_version()
    if torch.cuda.is_available():
        raise RuntimeError("the CPU layer of Megatron-Core must not be loaded where CUDA exists")
    buffers = sys.modules.get("megatron.core.distributed.param_and_grad_buffer")
    if buffers is not None and not _ADAPTED:
        buffers._coalescing_manager = _gathering_by_dtype  # type: ignore[attr-defined]
    replaced: set[tuple[str, str, str]] = set()
    stand_in = _Torch("torch")
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith(_PACKAGES) or ".fsdp" in module_name:
            continue
        if getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
        for function in _functions(module):
            code, found = _with_constants(function.__code__)
            if found:
                function.__code__ = code
                replaced |= {(module_name, function.__name__, constant) for constant in found}
    if _ADAPTED:
        return
    if missing := [place for place in _EXPECTED if place not in replaced]:
        raise RuntimeError(f"Megatron-Core lacks places that its version is known to have: {missing}")
    _ADAPTED.extend(sorted(replaced))


_ADAPTED: list[tuple[str, str, str]] = []


@contextlib.contextmanager
def _gathering_by_dtype(group: Any, async_ops: bool = False) -> Iterator[Any]:
    """torch's coalescing of collectives, less what gloo gets wrong: where data types differ, gathered weights come out
    as zeros. Chunks of an interleaved pipeline gather FP32 and bf16 weights together."""
    with c10d._coalescing_manager(group, async_ops=async_ops) as works:
        yield works
        together = c10d._world.pg_coalesce_state[group]
        apart = [each for each in together if each.tensor.dtype != together[0].tensor.dtype]
        together[:] = [each for each in together if each.tensor.dtype == together[0].tensor.dtype]
    for each in apart:
        assert each.op is c10d.all_gather_single, f"{each.op.__name__} over several data types"
        works.append(each.op(each.dst_tensor, each.tensor, group, async_ops))


def adapted_places() -> list[tuple[str, str, str]]:
    """(module, function, constant) of every replacement made by the first :func:`adapt`."""
    return list(_ADAPTED)


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods defined in ``module``, unwrapped from decorators."""
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                yield from _unwrapped(member, module)
        else:
            yield from _unwrapped(value, module)


def _unwrapped(value: Any, module: types.ModuleType) -> Iterator[types.FunctionType]:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.partial):
        value = value.func
    with contextlib.suppress(AttributeError):
        while hasattr(value, "__wrapped__"):
            value = value.__wrapped__
    if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
        yield value


def _with_constants(code: types.CodeType) -> tuple[types.CodeType, set[str]]:
    """``code`` with :data:`CONSTANTS` replaced, also inside tuples and nested functions, and which were found."""
    found: set[str] = set()

    def replace(constant: Any) -> Any:
        if isinstance(constant, str) and constant in CONSTANTS:
            found.add(constant)
            return CONSTANTS[constant]
        if isinstance(constant, tuple):
            return tuple(map(replace, constant))
        if isinstance(constant, frozenset):
            return frozenset(map(replace, constant))
        if isinstance(constant, types.CodeType):
            inner, names = _with_constants(constant)
            found.update(names)
            return inner
        return constant

    constants = tuple(map(replace, code.co_consts))
    return (code.replace(co_consts=constants) if found else code), found
