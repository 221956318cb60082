"""Rules of ``optimizer.offload``: what it can be combined with, and fields that nothing would read. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from pretrain.config.schema import DeepSpeedConfig, EngineConfig, MegatronConfig, OffloadConfig
from pretrain.config.violation import Violation

_NODE: Final = "optimizer.offload"
_OFF: Final = f"{_NODE}.enabled=false"


def _read_fields_only(offload: OffloadConfig) -> Iterator[Violation]:
    """Fields that differ from their defaults while nothing is offloaded."""
    if offload.enabled:
        return
    for f in dataclasses.fields(OffloadConfig):
        value = getattr(offload, f.name)
        if value != f.default:
            shown = _word(f.default)
            yield Violation(
                f"{_NODE}.{f.name}",
                value,
                f"its default {shown}: nothing reads it while {_OFF}",
                f"{_NODE}.enabled=true, or {_NODE}.{f.name}={shown}",
            )


def _engine_can_offload(engine: EngineConfig, offload: OffloadConfig) -> Iterator[Violation]:
    if not offload.enabled:
        return
    if isinstance(engine, DeepSpeedConfig):
        yield from _deepspeed_can_offload(engine)
    elif isinstance(engine, MegatronConfig) and not engine.distributed_optimizer:
        yield Violation(
            "engine.distributed_optimizer",
            False,
            f"true with {_NODE}.enabled=true: what is offloaded are the shards of Megatron's distributed optimizer",
            f"engine.distributed_optimizer=true (works with one process too), or {_OFF}",
        )


def _deepspeed_can_offload(engine: DeepSpeedConfig) -> Iterator[Violation]:
    if engine.zero_stage == 0:
        yield Violation(
            "engine.zero_stage",
            0,
            f"1, 2 or 3 with {_NODE}.enabled=true: at stage 0 torch's own optimizer steps on the whole weights where"
            " they are, and there are no flat partitions to offload",
            f"engine.zero_stage=1 (works with one process too), or {_OFF}",
        )
    if engine.offload_optimizer:
        yield Violation(
            "engine.offload_optimizer",
            True,
            f"false with {_NODE}.enabled=true: both keep the same optimizer state in host memory, DeepSpeed's way or"
            " this platform's",
            f"engine.offload_optimizer=false (placement is then computed), or {_OFF}",
        )
    if engine.offload_parameters:
        yield Violation(
            "engine.offload_parameters",
            True,
            f"false with {_NODE}.enabled=true: the update writes weights on the model's device, and DeepSpeed would"
            " move them to host memory between steps",
            f"engine.offload_parameters=false, or {_OFF} with engine.offload_optimizer=true",
        )


def _weights_hold_the_high_bits(precision: str, offload: OffloadConfig) -> Iterator[Violation]:
    if offload.enabled and offload.master == "low_bits" and precision == "fp32":
        yield Violation(
            f"{_NODE}.master",
            "low_bits",
            "full with train.precision=fp32: FP32 weights are their own master, so that no separate copy is kept and"
            " nothing is left to save",
            f"{_NODE}.master=full, or train.precision=bf16",
        )


def _word(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


OFFLOAD_RULES: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    ((_NODE,), _read_fields_only),
    (("engine", _NODE), _engine_can_offload),
    (("train.precision", _NODE), _weights_hold_the_high_bits),
)
"""(paths of the values a rule takes, the rule), as in :mod:`pretrain.config.rules`. Without the node, under another
optimizer, none of them runs."""
