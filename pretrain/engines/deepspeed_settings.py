"""Our configuration as DeepSpeed's JSON. Torch-free."""

from __future__ import annotations

from typing import Any

from pretrain.config.schema import Config


def deepspeed_settings(config: Config, dp_size: int) -> dict[str, Any]:
    """DeepSpeed configuration for this run on ``dp_size`` data-parallel ranks."""
    engine, train = config.engine, config.train
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp_size),
        "train_batch_size": train.global_batch_size,
        # At stage 0 the engine clips by itself, because DeepSpeed does not tell the norm there.
        "gradient_clipping": (train.clip_grad_norm or 0.0) if engine.zero_stage else 0.0,
        "steps_per_print": 10**12,
        # The client optimizer is torch's AdamW also where DeepSpeed would insist on its own CPU Adam, whose state
        # does not survive a resume bit for bit.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.reduce_bucket_size,
            "allgather_bucket_size": engine.allgather_bucket_size,
            "overlap_comm": engine.overlap_comm,
        },
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # Sums of bf16 gradients over micro-batches and ranks lose bits that FP32 keeps.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
