"""Typed configuration schema: what a run may say, with units. Torch-free.

The tree has one node per Hydra group. ``model``, ``data`` and ``objective`` are *components*: their node names a
class with ``_target_`` and the rest are its fields, so a class from outside this repository is configured the same
way as ours (see :mod:`pretrain.config.components`).

A field is *extendable* when its metadata says so: only such fields may change when a run is continued. They are the
length of the run, intervals, logging, and the layout (processes, micro-batch, ZeRO stage), on which results do not
depend beyond floating-point rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

EXTENDABLE: dict[str, bool] = {"extendable": True}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Identity of a run.

    ``name`` labels the run directory and the MLflow run; ``seed`` keys every random draw; ``root`` is the folder that
    receives run directories; ``import_paths`` are folders put on ``sys.path`` of every process, for components that
    live outside the installed packages.
    """

    name: str = "run"
    seed: int = 1234
    root: str = "runs"
    import_paths: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Batch sizes count sequences; intervals and ``steps`` count optimizer steps (0 switches one off).

    Validation uses ``eval_samples`` samples spread evenly over the split (None: all); the one after the last step uses
    the whole split when ``final_eval`` is set, which bits per byte need.
    """

    steps: int = field(default=100, metadata=EXTENDABLE)
    global_batch_size: int = 8
    micro_batch_size: int = field(default=2, metadata=EXTENDABLE)
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_grad_norm: float | None = 1.0
    log_interval: int = field(default=1, metadata=EXTENDABLE)
    eval_interval: int = field(default=50, metadata=EXTENDABLE)
    eval_samples: int | None = field(default=None, metadata=EXTENDABLE)
    final_eval: bool = field(default=True, metadata=EXTENDABLE)
    checkpoint_interval: int = field(default=50, metadata=EXTENDABLE)
    keep_checkpoints: int = field(default=3, metadata=EXTENDABLE)
    sample_interval: int = field(default=0, metadata=EXTENDABLE)
    sample_prompts: list[str] = field(default_factory=list, metadata=EXTENDABLE)
    sample_tokens: int = field(default=64, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then ``kind`` down to ``final_ratio`` x peak at step ``horizon``.

    ``horizon`` (optimizer steps) is frozen to ``train.steps`` when the run is created and stays so when the run is
    extended, unless it is overridden by name. After the horizon the final value is kept.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    horizon: int | None = field(default=None, metadata=EXTENDABLE)
    final_ratio: float = 0.1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101). ``learning_rate`` is the peak of ``schedule``."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Engine choice. ``zero_stage`` 0 replicates optimizer state, 1 shards it, 2 also shards gradients.

    Bucket sizes count elements.
    """

    name: Literal["deepspeed"] = "deepspeed"
    zero_stage: int = field(default=1, metadata=EXTENDABLE)
    reduce_bucket_size: int = field(default=50_000_000, metadata=EXTENDABLE)
    allgather_bucket_size: int = field(default=50_000_000, metadata=EXTENDABLE)
    overlap_comm: bool = field(default=False, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """How processes start. One process per rank; ``threads_per_process`` is ``OMP_NUM_THREADS`` (None: share cores)."""

    name: Literal["local"] = "local"
    num_processes: int = field(default=1, metadata=EXTENDABLE)
    threads_per_process: int | None = field(default=None, metadata=EXTENDABLE)
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=EXTENDABLE)
    shutdown_grace_s: float = field(default=120.0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow tracking. ``uri`` None means ``$MLFLOW_TRACKING_URI`` or else the embedded SQLite store in ``store``."""

    enabled: bool = field(default=True, metadata=EXTENDABLE)
    uri: str | None = field(default=None, metadata=EXTENDABLE)
    store: str = field(default="mlruns", metadata=EXTENDABLE)
    experiment: str = "pretrain"
    flush_interval_s: float = field(default=10.0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole resolved tree. ``model``, ``data`` and ``objective`` hold component instances after validation."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: Any = None
    data: Any = None
    objective: Any = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
