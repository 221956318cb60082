"""The arms of the benchmark: ways to keep and update optimizer state, ours and others', each with its settings.

Torch-free. Rivals go through plain ``deepspeed.initialize`` with the keys that their documentation gives to a user.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

LEARNING_RATE: Final = 3e-4
BETAS: Final = (0.9, 0.95)
EPS: Final = 1e-8
WEIGHT_DECAY: Final = 0.1
CLIP: Final = 1.0
SUBGROUP: Final = 100_000_000

GIB = 2**30
STOCK_HOST_BYTES = 18
"""Host memory of DeepSpeed's ZeRO-3 offload for a parameter: FP32 master and moments, FP32 and BF16 gradient."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    ``kind``: ``torch`` is ``OffloadedAdamW`` in plain torch, ``engine`` our DeepSpeed engine, ``deepspeed`` a rival.
    ``reference``: the arm without offload that computes the same. ``equivalent``: the update is that of AdamW with
    clipping; where not, ``note`` says why. ``needs_gpu``: why it cannot run without one. ``offload``: fields of
    ``optimizer.offload``. ``prefetch``: state may come in the last backward pass (with overlap). ``zero``,
    ``offload_optimizer``, ``compile``: blocks of DeepSpeed's JSON. ``min_warmup``: steps until it runs as it will.
    ``one_micro_batch``: it takes no gradient accumulation. ``by_ratio``: ``offload_optimizer.ratio`` is chosen, the
    least that fits into device memory. ``host_bytes``: of host memory for a parameter.
    """

    name: str
    label: str
    kind: Literal["torch", "engine", "deepspeed"]
    reference: str
    equivalent: bool = True
    note: str = ""
    needs_gpu: str | None = None
    ablation: bool = False
    clip: float | None = CLIP
    offload: Mapping[str, Any] = field(default_factory=dict)
    prefetch: bool = True
    zero: Mapping[str, Any] = field(default_factory=dict)
    offload_optimizer: Mapping[str, Any] = field(default_factory=dict)
    compile: Mapping[str, Any] = field(default_factory=dict)
    min_warmup: int = 0
    one_micro_batch: bool = False
    by_ratio: bool = False
    host_bytes: float = 0.0

    @property
    def ours(self) -> bool:
        return self.kind != "deepspeed"

    @property
    def offloads(self) -> bool:
        return self.name not in NO_OFFLOAD


NO_OFFLOAD: Final = ("torch_resident", "engine_resident", "zero3")
STOCK: Final = "zero3_offload"

_CPU: Final = {"device": "cpu", "pin_memory": True}


def _ours(name: str, label: str, *, host: float, **more: Any) -> Arm:
    """``host``: bytes a parameter, without rings of buffers."""
    kind: Literal["torch", "engine"] = "engine" if name.startswith("engine") else "torch"
    offload = {"subgroup_size": SUBGROUP, "resident_fraction": 0.0, **more.pop("offload")}
    # After five updates the plan follows what they showed of memory and times; two more make it warm.
    follows = "auto" in (offload["fraction"], offload["resident_fraction"]) or offload["overlap"]
    warmup = 8 if follows else 0
    return Arm(name, label, kind, f"{kind}_resident", offload=offload, min_warmup=warmup, host_bytes=host, **more)


def _ways(kind: str, where: str, gradient: int) -> list[Arm]:
    """Our ways in plain torch or in our engine; ``gradient``: bytes of one as it goes to the host."""
    return [
        _ours(
            f"{kind}_resident",
            f"no offload, ours{where}",
            host=0.0,
            offload={"fraction": 0.0, "resident_fraction": 1.0, "overlap": False},
        ),
        _ours(f"{kind}_cpu", f"ours{where}, CPU only", host=12.0, offload={"fraction": 0.0, "overlap": False}),
        _ours(f"{kind}_stream", f"ours{where}, streaming", host=12.0, offload={"fraction": 1.0, "overlap": False}),
        _ours(f"{kind}_hybrid", f"ours{where}, hybrid", host=12.0, offload={"fraction": "auto", "overlap": False}),
        _ours(
            f"{kind}_overlap",
            f"ours{where}, hybrid with overlap",
            # All gradients of the CPU's share lie on the host at once: at most all.
            host=12.0 + gradient,
            offload={"fraction": "auto", "overlap": True},
        ),
        _ours(
            f"{kind}_fitting",
            f"ours{where}, hybrid with overlap, resident what fits",
            host=12.0 + gradient,
            offload={"fraction": "auto", "resident_fraction": "auto", "overlap": True},
        ),
    ]


_ONLY_CUDA = "it runs on CUDA only"

RIVALS: Final = (
    Arm("zero3", "no offload, DeepSpeed ZeRO-3", "deepspeed", "zero3"),
    Arm(
        STOCK,
        "DeepSpeed ZeRO-3 offload",
        "deepspeed",
        "zero3",
        offload_optimizer=_CPU,
        host_bytes=STOCK_HOST_BYTES,
    ),
    Arm(
        "twinflow",
        "DeepSpeed TwinFlow, best ratio",
        "deepspeed",
        "zero3",
        needs_gpu="its split between GPU and CPU needs both",
        # Its ratio comes in steps of sub-groups.
        zero={"sub_group_size": SUBGROUP},
        offload_optimizer=_CPU,
        by_ratio=True,
        host_bytes=STOCK_HOST_BYTES,
    ),
    Arm(
        "zenflow",
        "DeepSpeed ZenFlow",
        "deepspeed",
        "zero3",
        equivalent=False,
        note="not equivalent: the update of most gradients is late",
        needs_gpu=_ONLY_CUDA,
        zero={
            "zenflow": {
                "topk_ratio": 0.05,
                "select_strategy": "auto",
                "select_interval": "auto",
                "update_interval": 4,
                "full_warm_up_rounds": 0,
                "overlap_step": True,
            }
        },
        offload_optimizer=_CPU,
        one_micro_batch=True,
        host_bytes=STOCK_HOST_BYTES,
    ),
    Arm(
        "superoffload",
        "DeepSpeed SuperOffload",
        "deepspeed",
        "zero3",
        needs_gpu=_ONLY_CUDA,
        offload_optimizer={**_CPU, "ratio": 0.9, "super_offload": True, "cpuadam_cores_perc": 0.9},
        host_bytes=STOCK_HOST_BYTES,
    ),
    Arm(
        "superoffload_noclip",
        "DeepSpeed SuperOffload, no clipping",
        "deepspeed",
        "zero3",
        equivalent=False,
        note="not equivalent: gradients are not clipped",
        needs_gpu=_ONLY_CUDA,
        clip=None,
        offload_optimizer={**_CPU, "ratio": 0.9, "super_offload": True, "cpuadam_cores_perc": 0.9},
        host_bytes=STOCK_HOST_BYTES,
    ),
    Arm(
        "deepcompile",
        "DeepSpeed DeepCompile, offload_opt_states",
        "deepspeed",
        "zero3",
        needs_gpu="it is not tried without one",
        compile={"deepcompile": True, "offload_opt_states": True},
        # It compiles in the first step and again when offloading begins.
        min_warmup=5,
        one_micro_batch=True,
        host_bytes=12.0,
    ),
)


def _subgroups(millions: int) -> Arm:
    return _ours(
        f"torch_overlap_{millions}m",
        f"hybrid with overlap, subgroups of {millions} million",
        host=14.0,
        ablation=True,
        offload={"fraction": "auto", "overlap": True, "subgroup_size": millions * 1_000_000},
    )


_NEEDS_PLAN = "without one there is no copy to take out of the way"
ABLATIONS: Final = (
    _ours(
        "torch_cpu_gradients",
        "CPU only, gradients to the host in the backward pass",
        host=14.0,
        ablation=True,
        needs_gpu=_NEEDS_PLAN,
        offload={"fraction": 0.0, "overlap": True},
    ),
    _ours(
        "torch_hybrid_gradients",
        "hybrid, gradients to the host in the backward pass",
        host=14.0,
        ablation=True,
        needs_gpu=_NEEDS_PLAN,
        offload={"fraction": "auto", "overlap": True},
        prefetch=False,
    ),
    _ours(
        "torch_overlap_low_bits",
        "hybrid with overlap, low bits of masters",
        host=12.0,
        ablation=True,
        offload={"fraction": "auto", "overlap": True, "master": "low_bits"},
    ),
    *(_subgroups(millions) for millions in (10, 30, 300, 1000)),
)

_ALL = (
    *_ways("torch", ", plain torch", gradient=2),
    *RIVALS,
    *_ways("engine", ", engine", gradient=4),
    *ABLATIONS,
)
ARMS: Final[dict[str, Arm]] = {arm.name: arm for arm in _ALL}
ABLATION_ROWS: Final = (
    "torch_cpu",
    "torch_cpu_gradients",
    "torch_stream",
    "torch_hybrid",
    "torch_hybrid_gradients",
    "torch_overlap",
    "torch_overlap_low_bits",
    "torch_overlap_10m",
    "torch_overlap_30m",
    "torch_overlap_300m",
    "torch_overlap_1000m",
)
"""Rows of the ablation table, our serial path first; those without ``ablation`` are arms of the main table too."""


def chosen(names: Sequence[str]) -> list[Arm]:
    """Arms by name, in the order of the tables; ``main``, ``ablation`` and ``all`` stand for many.

    Raises:
        ValueError: there is no such arm.
    """
    wanted: set[str] = set()
    for name in names:
        if name in ("main", "all"):
            wanted |= {arm.name for arm in ARMS.values() if not arm.ablation}
        if name in ("ablation", "all"):
            wanted |= {*ABLATION_ROWS, "torch_resident"}
        if name not in ("main", "ablation", "all"):
            if name not in ARMS:
                raise ValueError(f"--arms: found {name!r}, expected main, ablation, all or some of {', '.join(ARMS)}")
            wanted.add(name)
    return [arm for arm in ARMS.values() if arm.name in wanted]


def deepspeed_json(arm: Arm, rows: int, micro_rows: int, *, gpu: bool, ratio: float | None = None) -> dict[str, Any]:
    """A rival's configuration for ``rows`` sequences a step.

    Without a GPU torch's AdamW stands in for DeepSpeed's own, which it would compile first.
    """
    zero: dict[str, Any] = {"stage": 3, **copy.deepcopy(dict(arm.zero))}
    if arm.offload_optimizer:
        zero["offload_optimizer"] = dict(arm.offload_optimizer) | ({} if gpu else {"pin_memory": False})
        if ratio is not None:
            zero["offload_optimizer"]["ratio"] = ratio
    optimizer: dict[str, Any] = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    settings: dict[str, Any] = {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": rows // micro_rows,
        "gradient_clipping": arm.clip or 0.0,
        "bf16": {"enabled": True},
        "steps_per_print": 10**12,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": optimizer if gpu else {**optimizer, "torch_adam": True}},
    }
    if not gpu:
        settings["zero_force_ds_cpu_optimizer"] = False
    if arm.compile:
        settings["compile"] = dict(arm.compile)
    return settings


def first_ratio(parameters: int, device_bytes: float, tokens: int, vocabulary: int) -> float:
    """TwinFlow's ratio to begin with: the share of state that the GPU has no room for, in tenths, rounded up.

    Weights and gradients in BF16, 16 bytes of state and FP32 gradient for a parameter on the GPU, two copies of the
    logits in BF16 and one in FP32, and 6 GiB for the rest. Where it turns out too small the next tenth is tried.
    """
    room = device_bytes - 4 * parameters - 8 * tokens * vocabulary - 6 * GIB
    share = 1 - max(0.0, room) / (16 * parameters)
    return max(0, math.ceil(10 * share)) / 10


def host_bytes(arm: Arm, parameters: int) -> float:
    """Host memory that an arm's state needs at most, buffers included; the process itself and data come besides."""
    size = arm.offload.get("subgroup_size", 0) if arm.host_bytes else 0
    gradient = 4 if arm.kind == "engine" else 2
    return arm.host_bytes * parameters + 3 * min(size, parameters) * (gradient + 2)
