"""Our configuration as the fields of Megatron-Core's own configuration objects. Torch-free.

Blocks: ``parallel`` goes to ``parallel_state.initialize_model_parallel``, ``transformer`` to ``TransformerConfig``,
``ddp`` to ``DistributedDataParallelConfig`` and ``optimizer`` to ``OptimizerConfig``. Data types are written here as
``fp32`` and ``bf16``.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.config.schema import Config, MegatronConfig
from pretrain.config.violation import Violation, did_you_mean

_SOURCES = {
    "transformer": ("transformer/transformer_config.py", "model_parallel_config.py"),
    "ddp": ("distributed/distributed_data_parallel_config.py",),
    "optimizer": ("optimizer/optimizer_config.py",),
}
_HONOURED: dict[str, dict[str, tuple[type, str]]] = {
    "transformer": {
        # A pipeline rank frees what it has sent. Interleaved transfers may still be under way at that moment.
        "deallocate_pipeline_outputs": (bool, "engine.pipeline_parallel=2 or more with engine.virtual_pipeline=1"),
    },
    "ddp": {
        "check_for_nan_in_grad": (bool, ""),
        "check_for_large_grads": (bool, ""),
        "pad_buckets_for_high_nccl_busbw": (bool, "engine.distributed_optimizer=true"),
    },
    # All that acts is set by this platform or changes numbers or the layout of optimizer state.
    "optimizer": {},
}
"""Fields that act in this engine and leave numbers and checkpoints alone: their type, and where they act only."""

# Fields with a setting of this platform.
_OWNED: dict[str, dict[str, str]] = {
    "transformer": {
        "num_layers": "model.pattern or model.layer_ratios",
        "hidden_size": "model.width",
        "num_attention_heads": "model.attention.num_heads",
        "tensor_model_parallel_size": "engine.tensor_parallel",
        "sequence_parallel": "engine.sequence_parallel",
        "pipeline_model_parallel_size": "engine.pipeline_parallel",
        "virtual_pipeline_model_parallel_size": "engine.virtual_pipeline",
        "recompute_granularity": "train.activation_checkpointing",
        "recompute_method": "train.activation_checkpointing",
        "recompute_num_layers": "train.activation_checkpointing",
        "bf16": "train.precision",
        "fp16": "train.precision",
        "params_dtype": "train.precision",
        "pipeline_dtype": "train.precision or model.residual_fp32",
        "use_cpu_initialization": "launcher.device",
    },
    "ddp": {
        "use_distributed_optimizer": "engine.distributed_optimizer",
        "overlap_grad_reduce": "engine.overlap_grad_reduce",
        "overlap_param_gather": "engine.overlap_param_gather",
        "bucket_size": "engine.bucket_size",
    },
    "optimizer": {
        "optimizer": "optimizer.name",
        "lr": "optimizer.learning_rate",
        "min_lr": "optimizer.schedule",
        "weight_decay": "optimizer.weight_decay",
        "adam_beta1": "optimizer.betas",
        "adam_beta2": "optimizer.betas",
        "adam_eps": "optimizer.eps",
        "clip_grad": "train.clip_grad_norm",
        "bf16": "train.precision",
        "fp16": "train.precision",
        "params_dtype": "train.precision",
        "use_distributed_optimizer": "engine.distributed_optimizer",
        "overlap_param_gather": "engine.overlap_param_gather",
        "optimizer_cpu_offload": "optimizer.offload.enabled",
    },
}
_RESULTS = "changes results or the layout of state that checkpoints rest on"
_CALLABLES = "holds a function or an object that the engine hands to Megatron itself"
_LOSS_SCALE = "scales losses, which bf16 and fp32 do not need and this engine does not undo"
_UNREAD = "has no effect here: nothing reads what it computes"
_GROUPS = "would need groups of processes that the engine does not make"
_REASONS: dict[str, dict[str, str]] = {
    "transformer": {
        **dict.fromkeys(
            ("no_sync_func", "grad_sync_func", "param_sync_func", "finalize_model_grads_func", "grad_scale_func"),
            _CALLABLES,
        ),
        "timers": _CALLABLES,
        **dict.fromkeys(("calculate_per_token_loss", "perform_initialization"), _RESULTS),
        **dict.fromkeys(
            ("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"), _GROUPS
        ),
        **dict.fromkeys(
            ("gradient_accumulation_fusion", "defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
            "needs a CUDA extension of Apex that the engine does not rely on",
        ),
        **dict.fromkeys(
            ("overlap_p2p_comm", "overlap_p2p_comm_warmup_flush", "batch_p2p_comm", "batch_p2p_sync"),
            "follows from the pipeline schedule, which needs its transfers in the order that the engine chose",
        ),
        **dict.fromkeys(
            ("use_ring_exchange_p2p", "variable_seq_lengths"), "asks for transfers that the engine does not make"
        ),
        "microbatch_group_size_per_vp_stage": "is the number of pipeline ranks: evaluation runs so many micro-batches",
        "num_microbatches_with_partial_activation_checkpoints": "acts on Megatron's own recomputation, unused here",
        "deterministic_mode": "reaches the embedding only, while its name promises the whole run",
        "barrier_with_L1_time": "has no effect here: the engine gives Megatron no timers",
    },
    "ddp": {
        **dict.fromkeys(("grad_reduce_in_fp32", "average_in_collective"), _RESULTS),
        "num_distributed_optimizer_instances": _GROUPS,
        "reduce_scatter_with_fp32_accumulation": "has no use here: gradients are sent and summed in fp32 already",
        "align_param_gather": "needs param_sync_func, which the engine does not set",
        "nccl_ub": "needs memory that NCCL registers, which the engine does not ask for",
    },
    "optimizer": {
        **dict.fromkeys(
            ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"), _LOSS_SCALE
        ),
        **dict.fromkeys(
            (
                "decoupled_weight_decay",
                "apply_wd_to_qk_layernorm",
                "use_precision_aware_optimizer",
                "overlap_param_gather_with_optimizer_step",
                "main_grads_dtype",
                "main_params_dtype",
                "exp_avg_dtype",
                "exp_avg_sq_dtype",
            ),
            _RESULTS,
        ),
        **dict.fromkeys(("decoupled_lr", "decoupled_min_lr"), "has no effect: each step sets all learning rates"),
        "sgd_momentum": "acts on Megatron's SGD only; the optimizer here is AdamW",
        "log_num_zeros_in_grad": _UNREAD,
        "barrier_with_L1_time": "has no effect here: the engine gives Megatron no timers",
        "timers": _CALLABLES,
    },
}
_NOT_BUILT = {
    "transformer": "acts on Megatron's own model, which is not built here (the model is this platform's): no effect",
    "ddp": "acts on Megatron's FSDP or fp8 parameters, which this engine does not use: no effect",
    "optimizer": "acts on other optimizers of Megatron than the AdamW used here: no effect",
}


def megatron_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Final fields of each of Megatron-Core's objects for this run; the rest keeps Megatron's defaults."""
    engine, train, optimizer = config.engine, config.train, config.optimizer
    assert isinstance(engine, MegatronConfig)
    bf16 = train.precision == "bf16"
    virtual = engine.virtual_pipeline if engine.virtual_pipeline > 1 else None
    settings: dict[str, dict[str, Any]] = {
        "parallel": {
            "tensor_model_parallel_size": engine.tensor_parallel,
            "pipeline_model_parallel_size": engine.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": virtual,
        },
        "transformer": {
            # The schedules and parallel layers read sizes from here; our own modules are what is built. No part of
            # them reads the number of heads, which only has to be divisible.
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.width,
            "num_attention_heads": engine.tensor_parallel,
            "tensor_model_parallel_size": engine.tensor_parallel,
            "sequence_parallel": engine.sequence_parallel,
            "pipeline_model_parallel_size": engine.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": virtual,
            # What stages hand on is the residual stream.
            "pipeline_dtype": "fp32" if getattr(config.model, "residual_fp32", False) else train.precision,
            "params_dtype": train.precision,
            "bf16": bf16,
            # Two pipeline ranks are each other's next and previous: batched transfers would mix up the directions.
            "overlap_p2p_comm": virtual is not None,
            "batch_p2p_comm": virtual is None,
            # Gradients are sums over one global denominator; nothing may average them.
            "calculate_per_token_loss": True,
            # Values come from the canonical initialisation.
            "perform_initialization": False,
            "gradient_accumulation_fusion": False,
        },
        "ddp": {
            "use_distributed_optimizer": engine.distributed_optimizer,
            "overlap_grad_reduce": engine.overlap_grad_reduce,
            "overlap_param_gather": engine.overlap_param_gather,
            "bucket_size": engine.bucket_size,
            "grad_reduce_in_fp32": True,
        },
        "optimizer": {
            "optimizer": "adam",
            "lr": optimizer.learning_rate,
            "weight_decay": optimizer.weight_decay,
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_eps": optimizer.eps,
            # Infinity measures the norm without clipping; Megatron measures none at 0.
            "clip_grad": float("inf") if train.clip_grad_norm is None else train.clip_grad_norm,
            "bf16": bf16,
            "params_dtype": train.precision,
            "use_distributed_optimizer": engine.distributed_optimizer,
            "overlap_param_gather": engine.overlap_param_gather,
        },
    }
    for block, fields in engine.pass_through.items():
        settings[block] |= fields
    return settings


def megatron_violations(engine: MegatronConfig) -> Iterator[Violation]:
    """What Megatron-Core would ignore of the engine's fields, and all that is wrong with ``engine.pass_through``."""
    if engine.bucket_size is not None and not engine.overlap_grad_reduce:
        yield Violation(
            "engine.bucket_size",
            engine.bucket_size,
            "null without engine.overlap_grad_reduce=true: Megatron then communicates all gradients at once",
            "engine.overlap_grad_reduce=true, or engine.bucket_size=null",
        )
    yield from pass_through_violations(engine)


def pass_through_violations(engine: MegatronConfig) -> Iterator[Violation]:
    """Blocks, fields and values of ``engine.pass_through`` that this engine does not honour, with the reasons."""
    for block, fields in engine.pass_through.items():
        path = f"engine.pass_through.{block}"
        if block not in _SOURCES:
            yield Violation(path, fields, f"one of the blocks {', '.join(_SOURCES)}", "move the fields to their block")
        elif not isinstance(fields, Mapping):
            yield Violation(path, fields, "a mapping of fields to values", f"{path}.FIELD=VALUE")
        else:
            for name, value in fields.items():
                yield from _field_violations(engine, block, str(name), value)


def _field_violations(engine: MegatronConfig, block: str, name: str, value: Any) -> Iterator[Violation]:
    path = f"engine.pass_through.{block}.{name}"
    if name not in _HONOURED[block]:
        yield Violation(path, value, *_refusal(block, name))
        return
    kind, place = _HONOURED[block][name]
    if type(value) is not kind:
        yield Violation(path, value, f"a {kind.__name__}, found {type(value).__name__}", f"{path}=true or {path}=false")
    acts = {
        "deallocate_pipeline_outputs": engine.pipeline_parallel > 1 and engine.virtual_pipeline == 1,
        "pad_buckets_for_high_nccl_busbw": engine.distributed_optimizer,
    }
    if not acts.get(name, True):
        yield Violation(path, value, f"left out except at {place}: elsewhere it does not act", f"remove it, or {place}")


def _refusal(block: str, name: str) -> tuple[str, str]:
    """(rule, fix) for a field that is not honoured."""
    if name in _OWNED[block]:
        return "not passed through: this platform sets it", f"set {_OWNED[block][name]} instead"
    honoured = _HONOURED[block]
    listed = f"fields that are: {', '.join(honoured)}" if honoured else f"no field of {block} is"
    if name in _REASONS[block]:
        return f"not passed through ({listed}): it {_REASONS[block][name]}", "remove it"
    known = _known_fields(block)
    close = did_you_mean(name, honoured) or did_you_mean(name, sorted(known))
    if known and name not in known:
        fix = f"did you mean {close}?" if close else "remove it"
        return f"a field of the installed Megatron-Core's configuration that is passed through ({listed})", fix
    return f"not passed through ({listed}): it {_NOT_BUILT[block]}", "remove it"


def _known_fields(block: str) -> set[str]:
    """Annotated class fields in the installed sources, read without importing them; empty when not installed."""
    spec = importlib.util.find_spec("megatron")
    roots = [Path(root) / "core" for root in (spec.submodule_search_locations or [])] if spec else []
    names: set[str] = set()
    for root in roots:
        for source in _SOURCES[block]:
            if not (root / source).is_file():
                continue
            for node in ast.walk(ast.parse((root / source).read_text())):
                if isinstance(node, ast.ClassDef):
                    names |= {
                        item.target.id
                        for item in node.body
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                    }
    return names
