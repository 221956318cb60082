"""Megatron-Core engine: tensor, sequence and pipeline parallel, and data parallel with the distributed optimizer.

Megatron's own parallel layers, schedules, DistributedDataParallel, gradient finalisation and optimizer run; model
classes, initialisation, loss normalisation and checkpoints are this platform's. On CPU hosts with gloo through
:mod:`pretrain.parallel.megatron_cpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.layout import model_parallel_size
from pretrain.config.schema import Config, MegatronConfig
from pretrain.engines.activation_checkpointing import set_activation_checkpointing
from pretrain.engines.base import Accept, Batch, EvalResult, LossFunction, StepResult
from pretrain.engines.buffer_copies import BufferCopies
from pretrain.engines.clock import Clock
from pretrain.engines.flat_state import full_precision_values
from pretrain.engines.megatron_chunk import PipelineChunk, StageModel, StageOutput, zero_tokens
from pretrain.engines.megatron_offload import (
    OffloadedShards,
    clip_factor,
    leave_masters_outside,
    offloaded_optimizer,
    place_shards,
)
from pretrain.engines.megatron_offload_state import OffloadedMegatronState
from pretrain.engines.megatron_settings import megatron_settings
from pretrain.engines.megatron_state import MegatronState
from pretrain.nn.auxiliary import AuxiliaryLosses
from pretrain.optim.build import optimizer_of
from pretrain.optim.matrices import is_exempt, mark_embeddings, takes_muon
from pretrain.optim.muon import IS_MUON
from pretrain.parallel.canonical import canonical_buffers, canonical_parameters
from pretrain.parallel.megatron_groups import start_model_parallel
from pretrain.parallel.megatron_import import import_megatron
from pretrain.parallel.process import all_reduce_floats, gather_objects
from pretrain.parallel.pulse import PULSE
from pretrain.parallel.stage import Stage

BuildModel = Callable[[Any, Stage], nn.Module]
"""(parallel layers, stage) to an initialised module in FP32."""


class MegatronEngine:
    """See :class:`pretrain.engines.base.Engine`. Needs an initialised default process group.

    Args:
        build_model: constructs and initialises the chunk of the model for a stage.
        stages: the stages of each pipeline rank, in the order of its chunks.
    """

    def __init__(
        self, build_model: BuildModel, stages: Sequence[Sequence[Stage]], config: Config, device: torch.device
    ) -> None:
        import_megatron(device.type)
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.transformer_config import TransformerConfig

        from pretrain.parallel.megatron_layers import MegatronLayers

        assert isinstance(config.engine, MegatronConfig)
        self.device = device
        settings = _with_dtypes(megatron_settings(config))
        start_model_parallel(**settings["parallel"])
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
        is_last = pipeline_rank == config.engine.pipeline_parallel - 1
        self.is_data_leader = is_last and self._tp_rank == 0

        settings["transformer"]["use_cpu_initialization"] = device.type == "cpu"
        megatron_config = TransformerConfig(**settings["transformer"])
        # Built in FP32 whatever the precision: masters start from initial values that were not rounded.
        layers = MegatronLayers(replace(megatron_config, params_dtype=torch.float32))
        modules = [build_model(layers, stage) for stage in stages[pipeline_rank]]
        for module in modules:
            set_activation_checkpointing(module, config.train.activation_checkpointing)
        masters = [full_precision_values(module) for module in modules] if config.train.precision == "bf16" else None
        ties = config.engine.pipeline_parallel > 1 and bool(getattr(config.model, "tied_embeddings", False))
        self._chunks: list[Any] = []
        for number, (module, stage) in enumerate(zip(modules, stages[pipeline_rank], strict=True)):
            _cast(module, device, torch.bfloat16 if masters is not None else torch.float32)
            chunk = PipelineChunk(module, stage, megatron_config, ties)
            self._chunks.append(
                DistributedDataParallel(
                    megatron_config,
                    DistributedDataParallelConfig(**settings["ddp"]),
                    chunk,
                    disable_bucketing=number > 0,
                )
            )
        self._overlaps_gather = config.engine.overlap_param_gather
        megatron_config.finalize_model_grads_func = finalize_model_grads
        if config.engine.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self._chunks]
            megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._optimizer = _build_optimizer(settings["optimizer"], self._chunks, config)
        offloads = offloaded_optimizer(config) is not None
        self._state = (OffloadedMegatronState if offloads else MegatronState)(
            modules, self._optimizer, self.dp_rank, self._tp_rank
        )
        self._state.attach_muon(parallel_state.get_tensor_and_data_parallel_group(), device)
        self.offload = place_shards(self._state, masters, device) if offloads else None
        if masters is not None and self.offload is None:
            self._state.set_masters(masters)
        self._schedule = get_forward_backward_func()
        self._weight_decay = config.optimizer.weight_decay
        self._fill = config.engine.pipeline_parallel if config.engine.virtual_pipeline > 1 else 1
        self._metric_names: dict[bool, list[str]] = {}  # by whether they are those of training
        self.module: nn.Module | None = modules[0] if model_parallel_size(config.engine) == 1 else None
        self.parts: Sequence[nn.Module] = modules
        self._auxiliary = AuxiliaryLosses(modules, gather_objects)
        self.num_parameters = _count_parameters(modules, self.dp_rank, self._tp_rank)

    def train_step(
        self,
        microbatches: Sequence[Batch],
        loss: LossFunction,
        denominator: float,
        learning_rate: float,
        accept: Accept | None = None,
    ) -> StepResult:
        buffers = BufferCopies([chunk.module.module for chunk in self._chunks]) if accept is not None else None
        for group in self._param_groups():
            group["lr"] = learning_rate
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        clock = Clock(self.device)
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        # As the objective's loss in `_run`; Megatron multiplies by nothing (calculate_per_token_loss, zero_tokens).
        self._auxiliary.set_scale(1.0 / denominator)
        outputs = self._run(microbatches, loss, denominator, forward_only=False)
        clock.lap("forward_backward")
        PULSE.enter("optimizer")
        loss_sum, metrics = self._sums(outputs, training=True)
        result = StepResult(loss_sum, self._measure(), metrics, layers=self._auxiliary.report())
        if accept is None or accept(result):
            self._update(result.grad_norm)
        else:
            assert buffers is not None
            buffers.restore()
            if self.offload is not None:
                self.offload.states.discard()
        self._share_buffers()
        clock.lap("optimizer")
        result.seconds = clock.seconds()
        return result

    @torch.no_grad()
    def eval_step(self, batch: Batch, loss: LossFunction) -> EvalResult:
        for chunk in self._chunks:
            chunk.eval()
            if self._overlaps_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
        # The interleaved schedule needs as many micro-batches as pipeline ranks; only the first is counted.
        outputs = self._run([batch] * self._fill, loss, 1.0, forward_only=True)
        for chunk in self._chunks:
            if self._overlaps_gather:
                chunk.enable_forward_pre_hook()
        return EvalResult(*self._sums(outputs[:1], training=False))

    def export_state(self) -> Iterator[Fragment]:
        return self._state.export()

    def gradients(self) -> Iterator[Fragment]:
        return self._state.gradients()

    def scalar_state(self) -> dict[str, float]:
        return self._state.scalars()

    def import_state(self, reader: CheckpointReader) -> None:
        self._state.load(reader, reader.training["optimizer_scalars"])

    def _run(
        self, microbatches: Sequence[Batch], loss: LossFunction, denominator: float, *, forward_only: bool
    ) -> list[Any]:
        """Megatron's schedule over the micro-batches; the objective's outputs where the head is, else nothing."""
        begins = self.offload.early_start(len(microbatches)) if self.offload and not forward_only else None

        def watched(output: Tensor, wrapped: Any) -> Tensor:
            if begins is not None and wrapped is self._chunks[0]:
                begins(output)
            return output

        def forward_step(batches: Iterator[Batch], wrapped: Any) -> tuple[Tensor, Callable[..., Any]]:
            chunk: PipelineChunk = wrapped.module
            try:
                output = loss(StageModel(wrapped, chunk, split_vocabulary), next(batches))
            except StageOutput as stage_output:
                return watched(stage_output.hidden_LBD, wrapped), _no_loss
            mean = watched(output.loss_sum / denominator, wrapped)
            return mean, lambda scaled: (scaled, zero_tokens(self.device), output)

        split_vocabulary = getattr(loss, "vocabulary_parallel", False)
        if "tokens" not in microbatches[0]:
            raise ValueError(
                f"data: engine megatron takes the sequence length from the array 'tokens' [batch, length], found "
                f"{sorted(microbatches[0])}; name it so, or choose engine=deepspeed"
            )
        rows, length = microbatches[0]["tokens"].shape
        iterators = [iter(microbatches) for _ in self._chunks]
        return list(
            self._schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(microbatches),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=forward_only,
            )
        )

    def _measure(self) -> float:
        """Global norm of the reduced gradients. With :meth:`_update` this is Megatron's ``optimizer.step()``."""
        part = self._state.optimizer
        if part.prepare_grads():
            raise RuntimeError("Megatron-Core scaled the loss, which this engine does not ask for")
        if self.offload is not None:
            self.offload.send_gradients()
        return float(part.get_grad_norm())

    def _update(self, grad_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        part = self._state.optimizer
        if self.offload is not None:
            self.offload.grad_scale = clip_factor(grad_norm, part.config.clip_grad)
        elif parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters, part.config.clip_grad, grad_norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            )
        self._optimizer.step_with_ready_grads()

    def _sums(self, outputs: list[Any], *, training: bool) -> tuple[float, dict[str, float]]:
        """Sums of losses and metrics over micro-batches on the data leader; zeros under the same names elsewhere."""
        if training not in self._metric_names:
            names = gather_objects(sorted(outputs[0].metrics) if self.is_data_leader else None)
            self._metric_names[training] = next(given for given in names if given is not None)
        if not self.is_data_leader:
            return 0.0, dict.fromkeys(self._metric_names[training], 0.0)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics: dict[str, Tensor] = {}
        for output in outputs:
            total += output.loss_sum.detach()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach()
        return float(total), {name: float(value) for name, value in metrics.items()}

    def _share_buffers(self) -> None:
        """Running statistics are those of the first rank that holds them, as in torch's DistributedDataParallel."""
        from megatron.core import parallel_state

        for chunk in self._chunks:
            for _, buffer in canonical_buffers(chunk.module.module):
                for source, group in (
                    (parallel_state.get_data_parallel_src_rank(), parallel_state.get_data_parallel_group()),
                    (
                        parallel_state.get_tensor_model_parallel_src_rank(),
                        parallel_state.get_tensor_model_parallel_group(),
                    ),
                ):
                    torch.distributed.broadcast(buffer, source, group=group)

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        parts = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        return chain.from_iterable(part.optimizer.param_groups for part in parts)


def _count_parameters(modules: Sequence[nn.Module], dp_rank: int, tp_rank: int) -> int:
    """Elements of all logical tensors of the whole model."""
    counted = 0
    if dp_rank == 0 and tp_rank == 0:
        for parameter in chain.from_iterable(canonical_parameters(module) for module in modules):
            if not getattr(parameter.tensor, "shared", False):
                counted += sum(prod(part.shape) for part in parameter.parts)
    return round(all_reduce_floats([float(counted)])[0])


def _no_loss(_: Tensor) -> Any:
    raise AssertionError("the schedule asked a stage without a head for its loss")


def _with_dtypes(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    names = ("params_dtype", "pipeline_dtype")
    return {
        block: {name: dtypes[value] if name in names else value for name, value in fields.items()}
        for block, fields in settings.items()
    }


def _cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move the module; parameters that the forward pass reads in FP32 keep it, which Megatron's buffers allow."""
    kept = [(p, p.data) for p in module.parameters() if _keeps_fp32(p)]
    module.to(device=device, dtype=dtype)
    for parameter, values in kept:
        parameter.data = values.to(device)


def _keeps_fp32(parameter: Tensor) -> bool:
    return parameter.requires_grad and getattr(parameter, "keep_fp32", False)


def _build_optimizer(fields: dict[str, Any], chunks: list[Any], config: Config) -> Any:
    """Megatron's optimizer over torch's AdamW, or Muon, with the parameter groups of everywhere in this platform."""
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    overrides: dict[Any, Any] = {ParamKey(predicate=ParamPredicate("exempt", is_exempt)): {"wd_mult": 0.0}}
    if config.train.precision == "bf16":
        # The distributed optimizer mixes up the order of FP32 and bf16 parameters of one group.
        overrides[ParamKey(predicate=ParamPredicate("kept", _keeps_fp32))] = {"is_fp32": True}
    if config.optimizer.name == "muon":
        for chunk in chunks:
            mark_embeddings(chunk)
        overrides[ParamKey(predicate=ParamPredicate("muon", takes_muon))] = {IS_MUON: True}

    offloaded = offloaded_optimizer(config)

    def build(params: list[dict[str, Any]], *, adam_w_mode: bool, **ignored: Any) -> torch.optim.Optimizer:
        assert adam_w_mode
        if offloaded is not None:
            return OffloadedShards(params, offloaded)
        return optimizer_of(params, config.optimizer)

    megatron_config = megatron_optimizer.OptimizerConfig(**fields)
    if offloaded is not None:
        leave_masters_outside(megatron_config)
    # Fused Adams of Transformer Engine and Apex keep other state; torch's repeats a run bit for bit. Where Megatron has
    # found one, it takes what stands under this name.
    previous = megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam = False, build
    try:
        return megatron_optimizer.get_megatron_optimizer(
            megatron_config,
            chunks,
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam = previous
