"""Rules of the engines: which layouts and options fit together. Torch-free.

What depends on an engine's own settings is judged beside them; like a component, that check is found by its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pretrain.config.components import ForeignComponent
from pretrain.config.schema import (
    Config,
    DeepSpeedConfig,
    EngineConfig,
    MegatronConfig,
    OffloadConfig,
    OptimizerConfig,
    TrainConfig,
)
from pretrain.config.violation import Violation

LAYOUT: Final = ("engine.tensor_parallel", "engine.pipeline_parallel")
"""Numbers that are 1 on an engine that does not have them."""


def nearest_multiples(value: int, unit: int) -> list[int]:
    """The positive multiples of ``unit`` next to ``value``."""
    return [n for n in (value // unit * unit, (value // unit + 1) * unit) if n > 0]


def _nearest(path: str, value: int, unit: int) -> str:
    return "nearest: " + " or ".join(f"{path}={n}" for n in nearest_multiples(value, unit))


def _world_divides(num_processes: int, tensor: int, pipeline: int) -> Iterator[Violation]:
    unit = tensor * pipeline
    if num_processes % unit:
        yield Violation(
            "launcher.num_processes",
            num_processes,
            f"a multiple of engine.tensor_parallel x engine.pipeline_parallel = {tensor} x {pipeline} = {unit}",
            _nearest("launcher.num_processes", num_processes, unit),
        )


def _global_batch_divides(
    global_batch: int, micro_batch: int, num_processes: int, tensor: int, pipeline: int
) -> Iterator[Violation]:
    if num_processes % (tensor * pipeline):
        return  # there is no data-parallel size
    data = num_processes // (tensor * pipeline)
    unit = micro_batch * data
    if global_batch % unit:
        yield Violation(
            "train.global_batch_size",
            global_batch,
            f"a multiple of train.micro_batch_size x data-parallel size = {micro_batch} x {data} = {unit}",
            _nearest("train.global_batch_size", global_batch, unit),
        )


def _interleaving_fills(
    virtual: int, pipeline: int, tensor: int, global_batch: int, micro_batch: int, num_processes: int
) -> Iterator[Violation]:
    if virtual == 1:
        return
    if pipeline == 1:
        yield Violation(
            "engine.virtual_pipeline",
            virtual,
            "1 without a pipeline: only a rank of several can hold chunks in turn",
            "engine.virtual_pipeline=1, or engine.pipeline_parallel=2 or more",
        )
        return
    if num_processes % (tensor * pipeline):
        return
    unit = micro_batch * (num_processes // (tensor * pipeline))
    if global_batch % unit == 0 and (global_batch // unit) % pipeline:
        yield Violation(
            "train.global_batch_size",
            global_batch,
            f"with engine.virtual_pipeline={virtual}, as many micro-batches ({global_batch} / {unit} ="
            f" {global_batch // unit}) as a multiple of engine.pipeline_parallel = {pipeline}",
            _nearest("train.global_batch_size", global_batch, unit * pipeline)
            + ", or another train.micro_batch_size, or engine.virtual_pipeline=1",
        )


def _layers_suffice(pipeline: int, virtual: int, num_layers: int) -> Iterator[Violation]:
    if pipeline * virtual > num_layers:
        yield Violation(
            "engine.pipeline_parallel",
            pipeline,
            f"at least one layer for each of the {pipeline} x {virtual} (engine.virtual_pipeline) chunks;"
            f" the model has {num_layers} layers",
            f"engine.pipeline_parallel={max(num_layers // virtual, 1)} or less"
            + (", or engine.virtual_pipeline=1" if virtual > 1 else ""),
        )


def _split_fits(split: list[int] | None, pipeline: int, virtual: int, num_layers: int) -> Iterator[Violation]:
    chunks = pipeline * virtual
    if split is None or chunks > num_layers:
        return
    faults = []
    if len(split) != chunks:
        faults.append(f"{chunks} numbers, one for each of the {pipeline} x {virtual} chunks")
    if any(size < 1 for size in split):
        faults.append("at least one layer in each chunk")
    if sum(split) != num_layers:
        faults.append(f"a sum of {num_layers}, the layers of the model (here {sum(split)})")
    if faults:
        even = [num_layers * (i + 1) // chunks - num_layers * i // chunks for i in range(chunks)]
        shown = "[" + ",".join(map(str, even)) + "]"
        fix = f"engine.pipeline_split=null balances the chunks by cost; even would be {shown}"
        yield Violation("engine.pipeline_split", split, " and ".join(faults), fix)


def _sequence_parallel_has_ranks(sequence_parallel: bool, tensor: int) -> Iterator[Violation]:
    if sequence_parallel and tensor == 1:
        yield Violation(
            "engine.sequence_parallel",
            True,
            "false without tensor parallelism: its ranks share the sequence",
            "engine.sequence_parallel=false, or engine.tensor_parallel=2 or more",
        )


_SPLITTABLE: Final = ("num_layers", "width", "parallel_violations", "layer_costs", "end_costs")
"""What the configuration class of a model that Megatron-Core can train offers besides ``build(layers, stage)``."""


def _model_can_be_split(
    name: str, model: Any, tensor: int, sequence_parallel: bool, sequence_length: Any
) -> Iterator[Violation]:
    if missing := [name for name in _SPLITTABLE if not hasattr(model, name)]:
        what = model.target if isinstance(model, ForeignComponent) else type(model).__qualname__
        yield Violation(
            "engine.name",
            name,
            f"an engine that can train model {what}: Megatron-Core needs a model built from parallel layers, whose"
            f" configuration class says so with {', '.join(_SPLITTABLE)}; it lacks {', '.join(missing)}",
            "engine=deepspeed trains any model",
        )
        return
    length = sequence_length if isinstance(sequence_length, int) else None
    for field, found, rule, fix in model.parallel_violations(tensor, sequence_parallel, length):
        # The length of the training sequences belongs to the data, whichever way the model words it.
        yield Violation(f"{'data' if field == 'sequence_length' else 'model'}.{field}", found, rule, fix)


def _gather_overlap_has_its_parts(
    overlap_gather: bool, overlap_reduce: bool, distributed_optimizer: bool
) -> Iterator[Violation]:
    parts = {"overlap_grad_reduce": overlap_reduce, "distributed_optimizer": distributed_optimizer}
    missing = [f"engine.{name}=true" for name, is_on in parts.items() if not is_on]
    if overlap_gather and missing:
        yield Violation(
            "engine.overlap_param_gather",
            True,
            f"false without {' and '.join(missing)}: Megatron gathers what its distributed optimizer sharded, on the"
            " buckets that the overlapped reduction made",
            f"{' '.join(missing)}, or engine.overlap_param_gather=false",
        )


def _sampling_has_a_whole_model(
    interval: int, tensor: int, pipeline: int, overlap_gather: bool | None
) -> Iterator[Violation]:
    if interval > 0 and overlap_gather:
        yield Violation(
            "train.sample_interval",
            interval,
            "0 with engine.overlap_param_gather=true: rank 0 alone generates, while each forward pass gathers weights"
            " from all ranks",
            "train.sample_interval=0, and `pretrain generate` with a checkpoint of the run; or"
            " engine.overlap_param_gather=false",
        )
    elif interval > 0 and tensor * pipeline > 1:
        yield Violation(
            "train.sample_interval",
            interval,
            f"0 at engine.tensor_parallel={tensor}, engine.pipeline_parallel={pipeline}: no rank holds the whole model,"
            " which generation needs",
            "train.sample_interval=0, and `pretrain generate` with a checkpoint of the run",
        )


def _own_settings_fit(engine: EngineConfig, train: TrainConfig, offload: OffloadConfig | None) -> Iterable[Violation]:
    if isinstance(engine, DeepSpeedConfig):
        config = Config(train=train, engine=engine, optimizer=OptimizerConfig(offload=offload or OffloadConfig()))
        return _named("pretrain.engines.deepspeed_settings", "deepspeed_violations")(config)
    assert isinstance(engine, MegatronConfig)
    return [*_version_fits(engine), *_named("pretrain.engines.megatron_settings", "megatron_violations")(engine)]


def _version_fits(engine: MegatronConfig) -> Iterator[Violation]:
    try:
        _named("pretrain.parallel.megatron_import", "check_version")()
    except ValueError as error:
        rule, _, fix = str(error).rpartition("; ")
        yield Violation("engine.name", engine.name, rule, fix)


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


_DATA_PARALLEL: Final = ("launcher.num_processes", *LAYOUT)

ENGINE_RULES: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (_DATA_PARALLEL, _world_divides),
    (("train.global_batch_size", "train.micro_batch_size", *_DATA_PARALLEL), _global_batch_divides),
    (
        (
            "engine.virtual_pipeline",
            "engine.pipeline_parallel",
            "engine.tensor_parallel",
            "train.global_batch_size",
            "train.micro_batch_size",
            "launcher.num_processes",
        ),
        _interleaving_fills,
    ),
    (("engine.pipeline_parallel", "engine.virtual_pipeline", "model.num_layers"), _layers_suffice),
    (
        ("engine.pipeline_split", "engine.pipeline_parallel", "engine.virtual_pipeline", "model.num_layers"),
        _split_fits,
    ),
    (("engine.sequence_parallel", "engine.tensor_parallel"), _sequence_parallel_has_ranks),
    (
        ("engine.name", "model", "engine.tensor_parallel", "engine.sequence_parallel", "data.sequence_length?"),
        _model_can_be_split,
    ),
    (
        ("engine.overlap_param_gather", "engine.overlap_grad_reduce", "engine.distributed_optimizer"),
        _gather_overlap_has_its_parts,
    ),
    (("train.sample_interval", *LAYOUT, "engine.overlap_param_gather?"), _sampling_has_a_whole_model),
    (("engine", "train", "optimizer.offload?"), _own_settings_fit),
)
"""(paths of the values a rule takes, the rule); a path that ends in ``?`` may be absent and is None then."""
