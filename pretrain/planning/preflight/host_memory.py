"""Concern: the memory of each host holds what ranks keep there. Torch-free.

Two figures: the largest phase alone (below that it cannot work), and all phases on top of each other (with that it must
work). What is between is a warning. Activations count where ranks compute on CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.layout import data_parallel_size, model_parallel_size
from pretrain.config.schema import DeepSpeedConfig
from pretrain.nn.cost import FP32
from pretrain.parallel.control_groups import memory_room
from pretrain.planning.preflight.disk import state_numbers
from pretrain.planning.preflight.findings import Finding, error, ok, unknown, warning
from pretrain.planning.preflight.offload_memory import limit_of_a_rank, offload_need, offload_of, way_out
from pretrain.planning.preflight.storage import file_system, nearest_folder
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import GIB, percent, size

if TYPE_CHECKING:
    from data_pipeline.store.manifest import Manifest

PROCESS_BYTES = {False: 0.6 * GIB, True: 2.0 * GIB}
"""A rank before it has a model: interpreter, torch, engine; with CUDA its libraries and context too."""
_BF16 = 2
_WHOLE_AT_STAGE = {0: 4, 1: 2, 2: 1, 3: 0}
"""FP32 numbers for each parameter that every data-parallel rank keeps whole on CPU, by ZeRO stage (stage 0: weight,
gradient, two moments; 1: weight, gradient; 2: weight)."""
_SHARED_AT_STAGE = {0: 0, 1: 3, 2: 4, 3: 5}
"""The same, cut over the data-parallel ranks: master and moments; gradient; weight."""
_MASTER_AND_MOMENTS = 3
"""Of these numbers, those that ``optimizer.offload`` accounts for itself where it is in force."""
_COMFORT = 0.9


@dataclass(frozen=True)
class Budget:
    """Bytes on one node: of all its processes, while the model is built, while it trains, for a checkpoint's copy, for
    data, and what training may take besides."""

    processes: float
    building: float
    training: float
    snapshot: float
    data: float
    maybe: float = 0.0
    """Of what is decided only when the run starts."""

    @property
    def least(self) -> float:
        """Where phases do not overlap."""
        return self.processes + max(self.building, self.training + self.snapshot + self.data)

    @property
    def most(self) -> float:
        """Where nothing is given back in between."""
        return self.processes + self.building + self.training + self.snapshot + self.data + self.maybe


def check(subject: Subject) -> Iterator[Finding]:
    """The budget of the fullest node against its memory."""
    yield from _cache_in_memory(subject)
    if subject.parameters is None:
        yield unknown("budget", "the model states no number of parameters")
        return
    uses_gpu = subject.uses_gpu
    device = "GPU" if uses_gpu else "CPU"
    if uses_gpu is None:
        # The smaller need: nothing is refused for memory that may lie on GPUs.
        device, uses_gpu = "GPU nodes (taken to be such: launcher.device=auto)", True
    budget = node_budget(subject, subject.parameters, uses_gpu)
    parts = {
        f"{subject.ranks_per_node} processes": budget.processes,
        "building the model whole in FP32": budget.building,
        ("states that are offloaded" if uses_gpu else "weights, gradients, states, activations"): budget.training,
        "copy for a checkpoint": budget.snapshot,
        "open data": budget.data,
        "buffers of an offload plan, at most": budget.maybe,
    }
    yield from limit_of_a_rank(subject.config, subject.parameters, uses_gpu)
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    span = " to ".join(dict.fromkeys((size(budget.least), size(budget.most))))
    available, source = _available(subject)
    figures = {"least": budget.least, "most": budget.most}
    if available is None:
        yield unknown("budget", f"needs {span} ({shown}); {source}", "cluster.memory_per_node=...", **figures)
        return
    figures["available"] = available
    expected = f"{span} on {device}: {shown}"
    found = f"{size(available)} on a node ({source})"
    if budget.least > available:
        yield error("budget", found, f"at least {expected}", _way_out(subject, budget, uses_gpu), **figures)
    elif budget.most > _COMFORT * available:
        yield warning("budget", found, f"room for {expected}", _way_out(subject, budget, uses_gpu), **figures)
    else:
        yield ok("budget", f"{expected}; {found}", **figures)


def node_budget(subject: Subject, parameters: int, uses_gpu: bool) -> Budget:
    """What the ranks of the fullest node keep in its memory."""
    config, ranks = subject.config, subject.ranks_per_node
    engine, train = config.engine, config.train
    world = config.launcher.num_processes
    model_parallel = model_parallel_size(engine)
    data_parallel = max(data_parallel_size(config), 1)
    held = parameters / model_parallel  # of one rank's part of the model
    is_bf16 = train.precision == "bf16"
    # DeepSpeed is given a whole FP32 model on the host; its BF16 weights come beside it, and masters keep it alive.
    built_here = isinstance(engine, DeepSpeedConfig) or not uses_gpu
    building = ranks * held * (FP32 + _BF16 * is_bf16) if built_here else 0.0
    weight = _BF16 if is_bf16 else FP32
    training = maybe = 0.0
    need = offload_need(config, parameters, uses_gpu) if offload_of(config) is not None else None
    if need is not None:
        training += ranks * need.certain
        maybe = ranks * need.at_most
    if uses_gpu and isinstance(engine, DeepSpeedConfig):
        # Master, two moments, and the gradient on its way to them.
        training += ranks * parameters * 4 * FP32 / data_parallel if engine.offload_optimizer else 0.0
        training += ranks * parameters * weight / data_parallel if engine.offload_parameters else 0.0
    elif not uses_gpu:
        stage = engine.zero_stage if isinstance(engine, DeepSpeedConfig) else 1 if engine.distributed_optimizer else 0
        whole, shared = _WHOLE_AT_STAGE[min(max(stage, 0), 3)], _SHARED_AT_STAGE[min(max(stage, 0), 3)]
        if need is not None:
            shared -= _MASTER_AND_MOMENTS
        training += ranks * held * FP32 * (whole + shared / data_parallel) + ranks * _activations(subject)
    saved = state_numbers(config, parameters) * FP32 * ranks / world
    snapshot = saved if train.async_checkpoints and train.checkpoint_interval else 0.0
    return Budget(ranks * PROCESS_BYTES[uses_gpu], building, training, snapshot, ranks * _open_data(subject), maybe)


def _activations(subject: Subject) -> float:
    """Bytes that one micro-batch keeps on one rank; recomputed layers keep little of it."""
    length = subject.sequence_length
    if length is None:
        return 0.0
    from pretrain.models.hybrid.cost import model_cost

    train = subject.config.train
    width = _BF16 if train.precision == "bf16" else FP32
    kept = model_cost(subject.config.model, length, width).activation_bytes_per_token
    if train.activation_checkpointing == "layers":
        model = subject.config.model
        kept = width * (model.width * model.num_layers + model.vocab_size) + kept / max(model.num_layers, 1)
    return float(kept) * length * train.micro_batch_size / model_parallel_size(subject.config.engine)


def _open_data(subject: Subject) -> float:
    """Bytes of packed segments that one rank holds open: one for each lane that it reads, and another being opened."""
    data, length = subject.config.data, subject.sequence_length
    if length is None or not hasattr(data, "manifests"):
        return 0.0
    try:
        manifests: dict[str, Manifest] = data.manifests()
    except (ValueError, OSError):
        return 0.0
    from data_pipeline.plan import blocks_per_segment
    from data_pipeline.text_build import num_blocks, recommended_lanes

    train = subject.config.train
    rows = max(train.global_batch_size // max(data_parallel_size(subject.config), 1), 1)
    total = 0.0
    for manifest in manifests.values():
        if manifest.kind != "text":
            continue
        blocks = num_blocks(manifest, "train")
        lanes = getattr(data, "num_lanes", None) or recommended_lanes(manifest, blocks)
        # A rank comes back to the same lanes only where a step is a whole number of rounds.
        read = min(lanes, rows) if train.global_batch_size % lanes == 0 else lanes
        tokens = manifest.content["block_tokens"] * blocks_per_segment(
            blocks, manifest.content["block_tokens"], length, lanes
        )
        total += (read + 1) * tokens * FP32
    return total


def _available(subject: Subject) -> tuple[float | None, str]:
    if subject.slurm is None:
        import psutil

        free, source = float(psutil.virtual_memory().available), "free on this host"
        limit = memory_room()
        return (limit, "the limit of this control group") if limit is not None and limit < free else (free, source)
    from launchers.slurm.commands import SlurmError
    from pretrain.planning.preflight.cluster_facts import memory_mb, node_memory_mb

    cluster = subject.config.cluster
    if (asked := memory_mb(cluster.memory_per_node)) is not None and asked > 0:
        return asked * 2**20, f"cluster.memory_per_node={cluster.memory_per_node}"
    try:
        found = node_memory_mb(subject.cluster_facts(), cluster, subject.slurm)
    except SlurmError:
        return None, "Slurm does not tell the memory of a node"
    return (found[0] * 2**20, found[1]) if found is not None else (None, "nobody tells the memory of a node")


def _cache_in_memory(subject: Subject) -> Iterator[Finding]:
    """A cache folder on a file system in memory takes its size from the ranks."""
    data = subject.config.data
    fetch = getattr(data, "fetch", None)
    locations = [getattr(data, "path", None), *getattr(data, "sources", {}).values()]
    if fetch is None or not any("://" in (location or "") for location in locations):
        return
    import tempfile

    folder = Path(fetch.cache_folder or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    if file_system(nearest_folder(folder)) in ("tmpfs", "ramfs"):
        yield warning(
            "data.fetch.cache_folder",
            f"{folder} is memory here, and the cache may take {fetch.cache_gib:g} GiB of it",
            "a folder on a disk of the node",
            "data.fetch.cache_folder=/PATH/ON/A/LOCAL/DISK, or a smaller data.fetch.cache_gib",
        )


def _way_out(subject: Subject, budget: Budget, uses_gpu: bool) -> str:
    ways = []
    if subject.ranks_per_node > 1:
        ways.append("fewer ranks on a node")
    engine = subject.config.engine
    if budget.building >= budget.training and isinstance(engine, DeepSpeedConfig) and budget.building > 0:
        share = percent(budget.building, budget.most)
        ways.append(f"engine=megatron, which builds parts ({share} of the need is the whole model in every rank)")
    if isinstance(engine, DeepSpeedConfig) and (engine.offload_optimizer or engine.offload_parameters):
        ways.append("engine.offload_optimizer=false, engine.offload_parameters=false")
    if (offload := offload_of(subject.config)) is not None:
        ways.append(way_out(offload, subject.config.train.precision, uses_gpu))
    if budget.snapshot:
        ways.append("train.async_checkpoints=false")
    return ", or ".join([*ways, "nodes with more memory"])
