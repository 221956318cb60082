"""Our configuration as DeepSpeed's JSON, and what DeepSpeed cannot honour of it. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pretrain.config.layout import data_parallel_size
from pretrain.config.schema import Config, DeepSpeedConfig, OffloadConfig
from pretrain.config.violation import Violation, did_you_mean

_ALL: Final = (0, 1, 2, 3)
_TOP_KEYS: Final = ("comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print")
"""Expert keys at the top of DeepSpeed's JSON (also ``zero_optimization``, whose keys follow)."""
_ZERO_KEYS: Final[dict[str, tuple[int, ...]]] = {
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "sub_group_size": (3,),
    "stage3_allgather_sequential": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_module_granularity_threshold": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "log_trace_cache_warnings": (3,),
    "enable_sanity_checks": (3,),
}
"""Expert keys of ``zero_optimization`` with the stages that read them: memory and speed, never results or state."""
_OWNED: Final[dict[str, str]] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_force_ds_cpu_optimizer": "optimizer (torch's AdamW, which resumes bit for bit)",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.reduce_bucket_size": "engine.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "engine.allgather_bucket_size",
    "zero_optimization.prefetch_bucket_size": "engine.prefetch_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "engine.prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "engine.persistence_threshold",
    "zero_optimization.stage3_param_persistence_threshold": "engine.persistence_threshold",
}
"""Keys of DeepSpeed's JSON that follow from our own fields."""


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON for a checked configuration whose engine is DeepSpeed."""
    engine, train = config.engine, config.train
    assert isinstance(engine, DeepSpeedConfig)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage:
        zero["reduce_bucket_size"] = engine.reduce_bucket_size
        zero["overlap_comm"] = engine.overlap_comm
    if engine.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = engine.allgather_bucket_size
    if engine.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = engine.prefetch_bucket_size
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * data_parallel_size(config)),
        "train_batch_size": train.global_batch_size,
        # At stage 0 the engine clips by itself, because DeepSpeed does not tell the norm there.
        "gradient_clipping": (train.clip_grad_norm or 0.0) if engine.zero_stage else 0.0,
        "steps_per_print": 10**12,
        # The client optimizer is torch's AdamW also where DeepSpeed would insist on its own CPU Adam, whose state
        # does not survive a resume bit for bit.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.optimizer.name == "muon":
        # DeepSpeed knows AdamW by its very class and asks for a word on any other.
        settings["zero_allow_untested_optimizer"] = True
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # Sums of bf16 gradients over micro-batches and ranks lose bits that FP32 keeps.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return _merged(settings, engine.pass_through)


def deepspeed_violations(config: Config) -> Iterator[Violation]:
    """What DeepSpeed cannot honour of a configuration whose fields are well typed and whose engine is DeepSpeed."""
    engine, train = config.engine, config.train
    assert isinstance(engine, DeepSpeedConfig)
    stage = engine.zero_stage
    if stage not in _ALL:
        yield Violation(
            "engine.zero_stage",
            stage,
            "0 (all replicated), 1 (optimizer state sharded), 2 (gradients too) or 3 (parameters too)",
            f"engine.zero_stage={min(max(stage, 0), 3)}",
        )
        return
    if stage == 0 and train.precision == "bf16":
        yield Violation(
            "engine.zero_stage",
            stage,
            "at least 1 with train.precision=bf16: DeepSpeed accumulates no fp32 gradients at stage 0",
            "engine.zero_stage=1 (works with one process too), or train.precision=fp32",
        )
    if stage == 0 and engine.offload_optimizer:
        yield Violation(
            "engine.offload_optimizer",
            True,
            "false at engine.zero_stage=0, where torch's own optimizer steps on the weights where they are",
            "engine.zero_stage=1 (works with one process too), or engine.offload_optimizer=false",
        )
    if stage < 3 and engine.offload_parameters:
        yield Violation(
            "engine.offload_parameters",
            True,
            f"false below engine.zero_stage=3; at stage {stage} every rank computes with whole weights on its device",
            "engine.zero_stage=3, or engine.offload_parameters=false",
        )
    if stage == 3 and train.sample_interval:
        yield Violation(
            "train.sample_interval",
            train.sample_interval,
            "0 at engine.zero_stage=3, where no rank holds the whole model that generation needs",
            "train.sample_interval=0 (`pretrain generate` samples from its checkpoints), or engine.zero_stage=2",
        )
    yield from _unread_fields(engine, train.precision, getattr(config.optimizer, "offload", None))
    yield from pass_through_violations(engine)


def pass_through_violations(engine: DeepSpeedConfig) -> Iterator[Violation]:
    """Keys of ``engine.pass_through`` that may not be passed: set by our own fields, not read, or not safe."""
    for key, value in engine.pass_through.items():
        if key != "zero_optimization":
            if key not in _TOP_KEYS:
                yield _refused(key, value, (*_TOP_KEYS, "zero_optimization"))
        elif not isinstance(value, Mapping):
            yield Violation(f"engine.pass_through.{key}", value, "a mapping of settings", "give key: value pairs")
        else:
            yield from _zero_violations(value, engine)


def _zero_violations(block: Mapping[str, Any], engine: DeepSpeedConfig) -> Iterator[Violation]:
    pinnable = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    for key, value in block.items():
        path = f"zero_optimization.{key}"
        if pinnable.get(key) and isinstance(value, Mapping) and set(value) <= {"pin_memory"}:
            continue
        if key not in _ZERO_KEYS:
            yield _refused(path, value, tuple(f"zero_optimization.{name}" for name in _ZERO_KEYS))
        elif engine.zero_stage not in _ZERO_KEYS[key]:
            stages = " or ".join(map(str, _ZERO_KEYS[key]))
            yield Violation(
                f"engine.pass_through.{path}",
                value,
                f"left out at engine.zero_stage={engine.zero_stage}: DeepSpeed reads it at stage {stages} only",
                "remove the key",
            )


def _refused(path: str, value: Any, known: tuple[str, ...]) -> Violation:
    if path in _OWNED:
        rule, fix = f"not passed through, because it follows from {_OWNED[path]}", f"remove the key; set {_OWNED[path]}"
    else:
        rule = f"one of {', '.join(known)}; others are unknown to DeepSpeed, or change results or the layout of state"
        guess = did_you_mean(path, known)
        fix = f"did you mean {guess}?" if guess else "remove the key"
    return Violation(f"engine.pass_through.{path}", value, rule, fix)


def _unread_fields(engine: DeepSpeedConfig, precision: str, offload: OffloadConfig | None) -> Iterator[Violation]:
    """Fields that differ from their defaults where DeepSpeed does not read them."""
    stage = engine.zero_stage
    # DeepSpeed's optimizer for this case reduces all gradients after the last backward pass, in buckets of its own.
    offloads = engine.offload_optimizer or (offload is not None and offload.enabled)
    is_bf16_optimizer = stage == 1 and precision == "bf16" and not offloads
    reduces_in_buckets = stage > 0 and not is_bf16_optimizer
    why_not = "bf16 at stage 1 without offload" if is_bf16_optimizer else f"stage {stage}"
    read = {
        "overlap_comm": reduces_in_buckets,
        "reduce_bucket_size": reduces_in_buckets,
        "allgather_bucket_size": stage in (1, 2),
        "prefetch_bucket_size": stage == 3,
        "persistence_threshold": stage == 3,
    }
    defaults = {f.name: f.default for f in dataclasses.fields(DeepSpeedConfig)}
    for name, is_read in read.items():
        value, default = getattr(engine, name), defaults[name]
        if not is_read and value != default:
            shown = str(default).lower()
            yield Violation(
                f"engine.{name}",
                value,
                f"its default {shown}: DeepSpeed does not read it at {why_not}",
                f"engine.{name}={shown}, or another engine.zero_stage",
            )


def _merged(settings: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for key, value in more.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, Mapping) else value
    return result
