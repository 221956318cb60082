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
# Fields with a setting of this platform, or on which its numbers and checkpoints rest.
_OWNED: dict[str, dict[str, str]] = {
    "transformer": {
        "num_layers": "model.pattern",
        "hidden_size": "model.width",
        "num_attention_heads": "",
        "tensor_model_parallel_size": "engine.tensor_parallel",
        "sequence_parallel": "engine.sequence_parallel",
        "pipeline_model_parallel_size": "engine.pipeline_parallel",
        "virtual_pipeline_model_parallel_size": "engine.virtual_pipeline",
        "recompute_granularity": "train.activation_checkpointing",
        "bf16": "train.precision",
        "fp16": "train.precision",
        "params_dtype": "train.precision",
        "pipeline_dtype": "train.precision",
        "overlap_p2p_comm": "",
        "batch_p2p_comm": "",
        "calculate_per_token_loss": "",
        "perform_initialization": "",
        "use_cpu_initialization": "launcher.device",
        "context_parallel_size": "",
        "expert_model_parallel_size": "",
        "expert_tensor_parallel_size": "",
    },
    "ddp": {
        "use_distributed_optimizer": "engine.distributed_optimizer",
        "overlap_grad_reduce": "engine.overlap_grad_reduce",
        "overlap_param_gather": "engine.overlap_param_gather",
        "bucket_size": "engine.bucket_size",
        "grad_reduce_in_fp32": "",
        "average_in_collective": "",
        "use_megatron_fsdp": "",
        "use_custom_fsdp": "",
        "num_distributed_optimizer_instances": "",
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
        "optimizer_cpu_offload": "",
        "use_precision_aware_optimizer": "",
        "overlap_param_gather_with_optimizer_step": "",
    },
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
            "pipeline_dtype": train.precision,
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


def pass_through_violations(engine: MegatronConfig) -> Iterator[Violation]:
    """Blocks and fields of ``engine.pass_through`` that Megatron lacks, or that this platform sets itself."""
    for block, fields in engine.pass_through.items():
        path = f"engine.pass_through.{block}"
        if block not in _SOURCES:
            yield Violation(path, fields, f"one of the blocks {', '.join(_SOURCES)}", "move the fields to their block")
            continue
        if not isinstance(fields, Mapping):
            yield Violation(path, fields, "a mapping of fields to values", f"{path}.FIELD=VALUE")
            continue
        known = _known_fields(block)
        for name, value in fields.items():
            if name in _OWNED[block]:
                place = _OWNED[block][name]
                fix = f"set {place} instead" if place else "remove it"
                yield Violation(f"{path}.{name}", value, "a field that this platform does not set itself", fix)
            elif known and name not in known:
                close = did_you_mean(str(name), sorted(known))
                fix = f"did you mean {path}.{close}?" if close else "look it up in the installed megatron-core"
                yield Violation(f"{path}.{name}", value, "a field of the installed Megatron-Core's configuration", fix)


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
