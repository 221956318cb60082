"""A step of DeepSpeed that asks, once the global gradient norm is known, whether the update is to be made.

DeepSpeed drops the update of a step by itself when gradients overflow: it forgets the gradients and leaves weights,
moments and step counts alone. The gates lead a step that is not accepted down that very path. Where its decision
falls differs by stage and is private to DeepSpeed, so every name is looked up with a check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from pretrain.engines.base import Accept, StepResult
from pretrain.engines.deepspeed_partitions import attribute

Ask = Callable[[float], bool]
"""Global gradient norm (infinity: some gradient is not finite) to whether the update is to be made."""


class StepGate(Protocol):
    def step(self, result: StepResult, accept: Accept | None, clip_norm: float) -> bool:
        """``engine.step()`` after the last micro-batch; fills ``result.grad_norm``. Returns whether it updated."""
        ...


def step_gate(engine: Any, stage: int) -> StepGate:
    """The gate for a DeepSpeed engine at a ZeRO stage."""
    return _PlainGate(engine) if stage == 0 else _ZeroGate(engine)


class _PlainGate:
    """Stage 0 in FP32: torch's optimizer as it is; gradients are whole on every rank and DeepSpeed keeps no norm."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def step(self, result: StepResult, accept: Accept | None, clip_norm: float) -> bool:
        trained = [p for p in self._engine.module.parameters() if p.grad is not None]
        # The two halves of torch's clip_grad_norm_: what is asked sees gradients as they are.
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        result.grad_norm = float(norm)
        if accept is None or accept(result):
            torch.nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
            self._engine.step()
            return True
        with _replaced(self._engine.optimizer, "step", lambda *_, **__: None):
            self._engine.step()
        return False


class _ZeroGate:
    """Stages 1 to 3, and DeepSpeed's bf16 optimizer of stage 1."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        zero = engine.optimizer
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):
            self._asking: Callable[[Any, Ask], Any] = _bf16_optimizer
        elif hasattr(zero, "scaled_global_norm"):
            attribute(zero, "_update_scale")
            self._asking = _stages_1_and_2
        else:
            attribute(zero, "_update_scale")
            attribute(zero, "_get_norm_groups")
            self._asking = _stage_3

    def step(self, result: StepResult, accept: Accept | None, clip_norm: float) -> bool:
        if accept is None:
            self._engine.step()
            result.grad_norm = float(self._engine.get_global_grad_norm())
            return True
        answers: list[bool] = []

        def ask(norm: float) -> bool:
            result.grad_norm = norm
            answers.append(accept(result))
            return answers[-1]

        with self._asking(self._engine.optimizer, ask):
            self._engine.step()
        if len(answers) != 1:
            raise RuntimeError(
                f"{type(self._engine.optimizer).__name__} of the installed DeepSpeed stepped without the norm of its "
                "gradients being seen; install the version in constraints.txt"
            )
        return answers[0]


@contextmanager
def _stages_1_and_2(zero: Any, ask: Ask) -> Iterator[None]:
    accumulated = attribute(zero, "averaged_gradients")
    with _between_norm_and_update(zero, "scaled_global_norm", float, ask):
        yield
    # With offloaded state DeepSpeed's way out leaves these, to which the next step would add.
    for group in accumulated:
        accumulated[group] = None


@contextmanager
def _stage_3(zero: Any, ask: Ask) -> Iterator[None]:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    with _between_norm_and_update(zero, "_get_norm_groups", lambda g: float(combine_grad_norm_groups(g)), ask):
        yield


@contextmanager
def _between_norm_and_update(zero: Any, measure_name: str, norm_of: Callable[[Any], float], ask: Ask) -> Iterator[None]:
    """Asks when the step of ``zero`` has measured its norm; ``norm_of`` reads it out of ``measure_name``'s answer."""
    norms: list[float] = []
    measure, update_scale = getattr(zero, measure_name), zero._update_scale

    def measured(*args: Any, **kwargs: Any) -> Any:
        answer = measure(*args, **kwargs)
        norms.append(norm_of(answer) / float(zero.loss_scale))
        return answer

    def decide(has_overflow: bool = False) -> None:
        # Called between the norm and the update; `overflow` is read right after.
        if ask(norms[0] if norms else math.inf):
            update_scale(has_overflow)
        else:
            zero.overflow = True  # without the scaler's word: there is no loss scale, and nothing need have overflown

    with _replaced(zero, measure_name, measured), _replaced(zero, "_update_scale", decide):
        yield


@contextmanager
def _bf16_optimizer(zero: Any, ask: Ask) -> Iterator[None]:
    import deepspeed.runtime.bf16_optimizer as module

    measure = attribute(module, "get_global_norm_of_tensors")

    def measured(*args: Any, **kwargs: Any) -> Any:
        norm = measure(*args, **kwargs)
        is_valid = bool(torch.isfinite(norm)) and float(norm) >= 0  # -1 stands for infinity and not-a-number
        return norm if ask(float(norm) if is_valid else math.inf) else torch.full_like(norm, math.inf)

    with _replaced(module, "get_global_norm_of_tensors", measured):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside; the attribute of the class shows again afterwards."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
