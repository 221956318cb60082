"""Typed configuration schema: what a run may say, with units. Torch-free.

The tree has one node per Hydra group. ``model``, ``data`` and ``objective`` are *components*: their node names a
class with ``_target_`` and the rest are its fields, so a class from outside this repository is configured the same
way as ours (see :mod:`pretrain.config.components`).

A field is *extendable* when its metadata says so: only such fields may change when a run is continued. They are the
length of the run, intervals, logging, and the layout (processes, micro-batch, ZeRO stage, where optimizer state lies),
on which results do not depend beyond floating-point rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.config.launch_schema import (
    EXTENDABLE,
    ClusterConfig,
    HealthConfig,
    LauncherConfig,
    LifecycleConfig,
    LocalConfig,
)
from pretrain.config.typecheck import ONLY_HERE


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

    ``activation_checkpointing`` ``layers`` keeps only the inputs of layers and computes their inside again in the
    backward pass. Of the checkpoints, the newest ``keep_checkpoints`` stay, those of steps that ``keep_every`` divides
    (0: none), and the ``keep_best`` with the lowest validation loss. With ``async_checkpoints`` training goes on while
    a background thread writes. ``trace`` records digests of samples, randomness and state at every step.

    ``init_from`` is the folder of a checkpoint, or one written by ``pretrain import``, whose weights the run begins
    with (None: initial weights from the seed); optimizer state starts anew. Its digest is kept, and it is not read
    again once the run has a checkpoint of its own.
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
    keep_every: int = field(default=0, metadata=EXTENDABLE)
    keep_best: int = field(default=0, metadata=EXTENDABLE)
    async_checkpoints: bool = field(default=True, metadata=EXTENDABLE)
    activation_checkpointing: Literal["none", "layers"] = field(default="none", metadata=EXTENDABLE)
    trace: bool = field(default=False, metadata=EXTENDABLE)
    init_from: str | None = None
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
class OffloadConfig:
    """Where the optimizer's state lives and where it is updated: never what the update computes.

    With ``enabled``, master weights and moments lie in host memory, cut into subgroups of ``subgroup_size`` elements.
    ``resident_fraction`` is the share of all elements whose state stays on the device; of the others, the share
    ``fraction`` is moved to the device and updated there, the rest is updated by the CPU. ``auto`` is computed from
    measured constants (without a device, 0). ``host_memory_gib`` limits each rank (GiB; None: what is free).
    ``master`` ``low_bits`` keeps the low 16 bits of the master weights only: bf16 weights hold the others.
    ``overlap`` moves state during the last backward pass and back during the next forward pass. ``cpu_threads`` update
    on the CPU (None: those of the process). Every ``replan_interval`` steps the constants are looked at again, every
    ``timeline_interval`` steps a timeline is written (0: never).
    """

    enabled: bool = field(default=False, metadata=EXTENDABLE)
    fraction: Literal["auto"] | float = field(default="auto", metadata=EXTENDABLE)
    resident_fraction: Literal["auto"] | float = field(default=0.0, metadata=EXTENDABLE)
    subgroup_size: int = field(default=100_000_000, metadata=EXTENDABLE)
    host_memory_gib: float | None = field(default=None, metadata=EXTENDABLE)
    master: Literal["full", "low_bits"] = field(default="full", metadata=EXTENDABLE)
    overlap: bool = field(default=True, metadata=EXTENDABLE)
    cpu_threads: int | None = field(default=None, metadata=EXTENDABLE)
    replan_interval: int = field(default=100, metadata=EXTENDABLE)
    timeline_interval: int = field(default=0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101). ``learning_rate`` is the peak of ``schedule``."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    offload: OffloadConfig = field(
        default_factory=OffloadConfig,
        metadata={ONLY_HERE: "AdamW works element by element, Muon on whole matrices, so its state cannot be cut up"},
    )


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices between hidden features, AdamW for all the rest.

    Updates of matrices are scaled as in Moonlight (arXiv 2502.16982), so that ``learning_rate`` and ``weight_decay``
    are those of AdamW and hold for both. ``momentum`` decays the gradients that are orthogonalised, by
    ``newton_schulz_steps`` rounds of a Newton-Schulz iteration computed in ``newton_schulz_precision``. ``betas`` and
    ``eps`` are AdamW's.
    """

    name: Literal["muon"] = "muon"
    learning_rate: float = 3e-4
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    newton_schulz_precision: Literal["fp32", "bf16"] = "fp32"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


OptimizerChoice = OptimizerConfig | MuonConfig
"""One of the optimizers, told apart by ``name``."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed: data parallel with ZeRO (arXiv 1910.02054).

    ``zero_stage`` 0 replicates everything, 1 shards optimizer state, 2 also gradients, 3 also parameters.
    ``offload_optimizer`` keeps FP32 masters and moments in host memory and steps there (stages 1 to 3);
    ``offload_parameters`` keeps the parameter shards there too (stage 3). ``overlap_comm`` reduces gradients while the
    backward pass goes on. Bucket sizes and the threshold count elements: gradients reduced at once, updated weights
    gathered at once (stages 1 and 2), parameters gathered ahead of use, and the size up to which stage 3 leaves a
    parameter unsharded. ``pass_through`` is merged into DeepSpeed's own JSON as it is, for experts; keys that this
    platform sets itself are refused there.
    """

    name: Literal["deepspeed"] = field(default="deepspeed", metadata=EXTENDABLE)
    zero_stage: int = field(default=1, metadata=EXTENDABLE)
    offload_optimizer: bool = field(default=False, metadata=EXTENDABLE)
    offload_parameters: bool = field(default=False, metadata=EXTENDABLE)
    reduce_bucket_size: int = field(default=50_000_000, metadata=EXTENDABLE)
    allgather_bucket_size: int = field(default=50_000_000, metadata=EXTENDABLE)
    prefetch_bucket_size: int = field(default=50_000_000, metadata=EXTENDABLE)
    persistence_threshold: int = field(default=100_000, metadata=EXTENDABLE)
    overlap_comm: bool = field(default=False, metadata=EXTENDABLE)
    pass_through: dict[str, Any] = field(default_factory=dict, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """Megatron-Core: tensor, sequence and pipeline parallel (arXiv 2104.04473, 2205.05198) with data parallel.

    The world of ``launcher.num_processes`` ranks is ``tensor_parallel`` x ``pipeline_parallel`` x data parallel.
    ``sequence_parallel`` also splits the activations between tensor-parallel regions along the sequence.
    ``virtual_pipeline`` > 1 gives every pipeline rank that many chunks of layers (the interleaved schedule).
    ``pipeline_split`` is the number of layers of each chunk in model order (None: balanced by cost).
    ``distributed_optimizer`` shards optimizer state over data-parallel ranks; the overlap options hide its
    communication behind computation; ``bucket_size`` counts elements of gradients communicated at once (None:
    Megatron's choice). ``pass_through`` holds expert settings in the blocks ``transformer``, ``ddp`` and ``optimizer``,
    fields of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig; fields that this platform
    sets itself are refused there.
    """

    name: Literal["megatron"] = field(default="megatron", metadata=EXTENDABLE)
    tensor_parallel: int = field(default=1, metadata=EXTENDABLE)
    sequence_parallel: bool = field(default=False, metadata=EXTENDABLE)
    pipeline_parallel: int = field(default=1, metadata=EXTENDABLE)
    virtual_pipeline: int = field(default=1, metadata=EXTENDABLE)
    pipeline_split: list[int] | None = field(default=None, metadata=EXTENDABLE)
    distributed_optimizer: bool = field(default=True, metadata=EXTENDABLE)
    overlap_grad_reduce: bool = field(default=False, metadata=EXTENDABLE)
    overlap_param_gather: bool = field(default=False, metadata=EXTENDABLE)
    bucket_size: int | None = field(default=None, metadata=EXTENDABLE)
    pass_through: dict[str, Any] = field(default_factory=dict, metadata=EXTENDABLE)


EngineConfig = DeepSpeedConfig | MegatronConfig
"""One of the engines, told apart by ``name``."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow tracking. ``uri`` None means ``$MLFLOW_TRACKING_URI`` or else the embedded SQLite store in ``store``.

    What is new is sent every ``flush_interval_s`` seconds. A request without an answer is given up after
    ``request_timeout_s`` and repeated later; at the end of an attempt at most ``close_timeout_s`` are spent on
    sending the rest. Every node's CPU, memory, GPUs, network and disk are measured every
    ``system_metrics_interval_s``, also where tracking is not enabled (0: never).
    """

    enabled: bool = field(default=True, metadata=EXTENDABLE)
    uri: str | None = field(default=None, metadata=EXTENDABLE)
    store: str = field(default="mlruns", metadata=EXTENDABLE)
    experiment: str = "pretrain"
    flush_interval_s: float = field(default=10.0, metadata=EXTENDABLE)
    request_timeout_s: float = field(default=60.0, metadata=EXTENDABLE)
    close_timeout_s: float = field(default=30.0, metadata=EXTENDABLE)
    system_metrics_interval_s: float = field(default=30.0, metadata=EXTENDABLE)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole resolved tree. ``model``, ``data`` and ``objective`` hold component instances after validation."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: Any = None
    data: Any = None
    objective: Any = None
    optimizer: OptimizerChoice = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=DeepSpeedConfig)
    launcher: LauncherConfig = field(default_factory=LocalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
