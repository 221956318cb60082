"""DeepSpeed engine: ZeRO stages 0 to 3 with torch's AdamW or Muon, on CUDA with NCCL or on CPU with gloo."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from pretrain.checkpoint.fragment import Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.schema import Config, DeepSpeedConfig, OffloadConfig, OptimizerConfig
from pretrain.engines.activation_checkpointing import set_activation_checkpointing
from pretrain.engines.base import Accept, Batch, EvalResult, LossFunction, StepResult
from pretrain.engines.buffer_copies import BufferCopies
from pretrain.engines.clock import Clock
from pretrain.engines.deepspeed_gate import step_gate
from pretrain.engines.deepspeed_import import import_deepspeed
from pretrain.engines.deepspeed_offload import ShardUpdate, offloading_engine
from pretrain.engines.deepspeed_offload_state import OffloadedDeepSpeedState
from pretrain.engines.deepspeed_settings import deepspeed_settings
from pretrain.engines.deepspeed_state import DeepSpeedState
from pretrain.engines.flat_state import full_precision_values
from pretrain.engines.full_precision import FullPrecision
from pretrain.nn.auxiliary import AuxiliaryLosses
from pretrain.optim.build import build_optimizer
from pretrain.parallel.canonical import canonical_buffers, canonical_parameters
from pretrain.parallel.process import gather_objects
from pretrain.parallel.pulse import PULSE


class DeepSpeedEngine:
    """See :class:`pretrain.engines.base.Engine`. Needs an initialised default process group.

    ``model`` is whole on every rank's host until this constructor has cut it up (stage 3): host memory must hold it.
    At stage 3 ``module`` is None.

    Raises:
        ValueError: the model cannot be trained with the engine's settings.
    """

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        assert isinstance(config.engine, DeepSpeedConfig)
        _prepare(model, config)
        num_parameters = sum(p.tensor.numel() for p in canonical_parameters(model))
        deepspeed = import_deepspeed(device.type)
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        self.device = device
        self.is_data_leader = True
        self.dp_rank = torch.distributed.get_rank()
        self.dp_size = torch.distributed.get_world_size()
        is_bf16 = config.train.precision == "bf16"
        masters = full_precision_values(model) if is_bf16 else {}
        self._full_precision = FullPrecision(model, device) if is_bf16 else None
        offload = _offload(config)
        with offloading_engine() if offload is not None else nullcontext():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.optimizer),
                config=deepspeed_settings(config),
                dist_init_required=False,
            )
        self._model: nn.Module = self._engine.module
        self.parts: Sequence[nn.Module] = [self._model]
        self._stage = config.engine.zero_stage
        self.module = None if self._stage == 3 else self._model
        self._clip_norm = config.train.clip_grad_norm
        self.num_parameters = num_parameters
        self._auxiliary = AuxiliaryLosses([self._model], gather_objects)
        layout = (self._engine, self._stage, self.dp_rank, self.dp_size)
        self.offload: ShardUpdate | None = None
        if offload is not None:
            self.offload = self._engine.optimizer.begin(offload, _by_tensor(self._model, masters))
            self._state: DeepSpeedState = OffloadedDeepSpeedState(*layout, self.offload)
        else:
            self._state = DeepSpeedState(*layout)
            self._state.attach_muon(device)
            if is_bf16:
                self._state.set_masters(masters)
        self._gate = step_gate(self._engine, self._stage)
        self._refresh()

    def train_step(
        self,
        microbatches: Sequence[Batch],
        loss: LossFunction,
        denominator: float,
        learning_rate: float,
        accept: Accept | None = None,
    ) -> StepResult:
        engine = self._engine
        buffers = BufferCopies([self._model]) if accept is not None else None
        self._model.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        clock = Clock(self.device)
        # DeepSpeed averages gradients over data-parallel ranks; ours is a sum over one global denominator.
        scale = self.dp_size / denominator
        self._auxiliary.set_scale(scale)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics: dict[str, torch.Tensor] = {}
        last = len(microbatches) - 1
        for index, batch in enumerate(microbatches):
            engine.set_gradient_accumulation_boundary(index == last)
            output = loss(engine, batch)
            clock.lap("forward")
            engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            clock.lap("backward")
            loss_sum += output.loss_sum.detach()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value.detach()
            if index != last:
                engine.step()
        result = StepResult(
            loss_sum=float(loss_sum),
            grad_norm=math.nan,  # known below
            metrics={name: float(value) for name, value in metrics.items()},
            layers=self._auxiliary.report(),
        )
        PULSE.enter("optimizer")
        if not self._gate.step(result, accept, self._clip_norm or math.inf):
            assert buffers is not None
            buffers.restore()
        self._refresh()
        # As in torch's DistributedDataParallel, running statistics are those of rank 0: one copy is the state.
        for _, buffer in canonical_buffers(self._model):
            torch.distributed.broadcast(buffer, 0)
        clock.lap("optimizer")
        result.seconds = clock.seconds()
        return result

    @torch.no_grad()
    def eval_step(self, batch: Batch, loss: LossFunction) -> EvalResult:
        self._model.eval()
        # At stage 3 DeepSpeed's wrapper gathers the parameters of each layer for its forward pass.
        output = loss(self._engine if self._stage == 3 else self._model, batch)
        return EvalResult(float(output.loss_sum), {name: float(value) for name, value in output.metrics.items()})

    def export_state(self) -> Iterator[Fragment]:
        return self._state.export()

    def gradients(self) -> Iterator[Fragment]:
        return self._state.gradients()

    def scalar_state(self) -> dict[str, float]:
        return self._state.scalars()

    def import_state(self, reader: CheckpointReader) -> None:
        self._state.load(reader, reader.training["optimizer_scalars"])
        self._refresh()

    def _refresh(self) -> None:
        """Let the forward pass read the present masters of parameters that stay in FP32."""
        if self._full_precision is not None:
            self._full_precision.refresh(self._state.master)


def _offload(config: Config) -> OffloadConfig | None:
    optimizer = config.optimizer
    return optimizer.offload if isinstance(optimizer, OptimizerConfig) and optimizer.offload.enabled else None


def _by_tensor(model: nn.Module, values: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """``values`` by ``id`` of the parameter instead of its name."""
    return {id(p.tensor): values[p.module_name] for p in canonical_parameters(model) if p.module_name in values}


def _prepare(model: nn.Module, config: Config) -> None:
    """Refuse what DeepSpeed cannot train, and hand the model its options."""
    scalars = [p.module_name for p in canonical_parameters(model) if p.tensor.ndim == 0]
    if scalars:
        raise ValueError(
            f"model: parameters without a dimension, which DeepSpeed cannot flatten: {', '.join(scalars)}; "
            "give them the shape [1]"
        )
    set_activation_checkpointing(model, config.train.activation_checkpointing)
