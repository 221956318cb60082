"""DeepSpeed's engine and ZeRO optimizers with offloaded states. Import it after DeepSpeed, by way of
:mod:`pretrain.engines.deepspeed_import`; see :mod:`pretrain.engines.deepspeed_offload`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.superoffload import superoffload_stage3  # noqa: F401  # subclasses stage 3 before ours is chosen
from deepspeed.runtime.utils import all_gather_dp_groups, is_invalid_grad_norm
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from pretrain.config.schema import OffloadConfig
from pretrain.engines.deepspeed_offload import Piece, ShardUpdate, factor


class OffloadingEngine(DeepSpeedEngine):
    """Chooses the classes below."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
        super()._do_optimizer_sanity_check(basic_optimizer)
        # For bf16 at stage 1 DeepSpeed has an optimizer of its own, which keeps what is offloaded here.
        return engine_module.ZERO_OPTIMIZATION

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        with (
            selected(engine_module, "DeepSpeedZeroOptimizer", OffloadedStages1And2),
            selected(stage3_module, "DeepSpeedZeroOptimizer_Stage3", OffloadedStage3),
        ):
            return super()._configure_zero_optimizer(optimizer)


@contextmanager
def selected(module: Any, name: str, chosen: type) -> Iterator[None]:
    """``module.name`` is ``chosen`` inside."""
    before = getattr(module, name)
    setattr(module, name, chosen)
    try:
        yield
    finally:
        setattr(module, name, before)


def _absent(numel: int) -> Tensor:
    """In place of an FP32 partition: its shape, without memory."""
    return torch.empty(numel, dtype=torch.float32, device="meta", requires_grad=True)


class OffloadedStage3(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3. DeepSpeed's own step is kept: it goes over its sub-groups, and with the last one everything is updated.

    Gradients are summed where DeepSpeed sums them, in one flat FP32 buffer on the device.
    """

    offload: ShardUpdate | None = None
    _grad_scale = 1.0

    def begin(self, config: OffloadConfig, masters: Mapping[int, Tensor]) -> ShardUpdate:
        """Create masters and moments; call it once, before the first step."""
        self.offload = ShardUpdate(list(self._pieces()), lambda: self.optimizer.param_groups, config, masters)
        return self.offload

    def _pieces(self) -> Iterator[Piece]:
        for number, sub_group in enumerate(self.fp16_groups):
            for parameter in sub_group:
                group, offset, length = self.grad_position[self.get_param_id(parameter)]
                start = dist.get_rank(group=self.dp_process_group) * length
                held = min(length, parameter.ds_numel - start)  # the others are padding
                if held > 0:
                    weight = self.fp16_partitioned_groups_flat[group].narrow(0, offset, held)
                    yield Piece(parameter, start, weight, self.sub_group_to_group_id[number])

    def _gradients(self) -> list[Tensor]:
        """Flat, by piece."""
        assert self.offload is not None
        flat = {
            id(parameter): gradient.reshape(-1)
            for number, sub_group in enumerate(self.fp16_groups)
            for parameter, gradient in zip(sub_group, self.averaged_gradients[number], strict=True)
        }
        return [flat[id(piece.parameter)] for piece in self.offload.pieces]

    def _create_fp32_partitions(self) -> None:
        for number, numel in enumerate(self.fp16_partitioned_groups_flat_numel):
            ids = self.fp16_partitioned_groups_flat_id[number]
            self.fp32_partitioned_groups_flat.append(_absent(int(numel)))
            self.fp32_partitioned_groups_flat[number].ds_id = f"{ids[0]}_{ids[-1]}"
        for group in self.optimizer.param_groups:
            group["params"] = []

    def initialize_optimizer_states(self) -> None:
        """There are none here."""

    def reduce_ready_partitions_and_remove_grads(self, param: Any) -> None:
        super().reduce_ready_partitions_and_remove_grads(param)
        if self.offload is not None and self.is_gradient_accumulation_boundary():
            self.offload.passed()

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> Any:
        # It empties the first list's parameters of their gradients, and leaves the lists as they are.
        buffers = super().partition_grads(params_to_release, grad_partitions)
        if self.offload is not None and self.is_gradient_accumulation_boundary():
            held = [p for p in params_to_release if self.offload.target(p) is not None]
            for parameter, buffer in zip(held, buffers, strict=True):
                self.offload.ready(parameter, buffer.view(-1))
        return buffers

    def _prepare_sub_group(self, sub_group_id: int, timer_names: Any) -> None:
        """Gradients are taken from where they are."""

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        # The update does it in its own pass.
        if sub_group_id == 0:
            self._grad_scale = factor(float(total_norm), float(self.loss_scale), float(self.clip_grad))

    def _optimizer_step(self, sub_group_id: int) -> None:
        assert self.offload is not None
        if sub_group_id == len(self.fp16_groups) - 1:
            self.offload.update(self._gradients(), self._grad_scale)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """The update has written the weights."""

    def _overflow_clean_up(self, prev_scale: Any) -> None:
        super()._overflow_clean_up(prev_scale)
        assert self.offload is not None
        self.offload.discard()


class OffloadedStages1And2(DeepSpeedZeroOptimizer):
    """Stages 1 and 2. DeepSpeed's own step copies masters into weights group by group, so it is replaced."""

    offload: ShardUpdate | None = None

    def begin(self, config: OffloadConfig, masters: Mapping[int, Tensor]) -> ShardUpdate:
        """Create masters and moments; call it once, before the first step."""
        self.offload = ShardUpdate(list(self._pieces()), lambda: self.optimizer.param_groups, config, masters)
        return self.offload

    def _pieces(self) -> Iterator[Piece]:
        for number, group in enumerate(self.bit16_groups):
            own = self.parallel_partitioned_bit16_groups[number][self._rank(number)]
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    place = mapping.hp_fragment_address
                    weight = own.detach().narrow(0, place.start, place.numel)
                    yield Piece(parameter, mapping.lp_fragment_address.start, weight, number)

    def _gradients(self) -> list[Tensor]:
        """Flat, by piece."""
        assert self.offload is not None
        places: list[dict[int, Tensor]] = []
        for number in range(len(self.bit16_groups)):
            offset, found = 0, {}
            for gradient in self.averaged_gradients[number]:
                # Padding is among them.
                found[offset] = gradient.reshape(-1)
                offset += gradient.numel()
            places.append(found)
        return [
            places[piece.group][piece.parameter._hp_mapping.hp_fragment_address.start]  # type: ignore[attr-defined]
            for piece in self.offload.pieces
        ]

    def _configure_master_weights(self, **settings: Any) -> torch.dtype:
        super()._configure_master_weights(**settings)
        # The constructor copies its partition of the weights to this type; the copy lives until it is through.
        dtype: torch.dtype = self.optimizer.param_groups[0]["params"][0].dtype
        return dtype

    def initialize_optimizer_states(self) -> None:
        """There are none here; and from now on there are no partitions of masters either."""
        for number, partition in enumerate(self.single_partition_of_fp32_groups):
            absent = _absent(partition.numel())
            self.single_partition_of_fp32_groups[number] = absent
            self.optimizer.param_groups[number]["params"] = [absent]

    def process_gradients(self, param: Any, i: int) -> None:
        super().process_gradients(param, i)
        if self.offload is not None and self.is_gradient_accumulation_boundary():
            self.offload.passed()

    def copy_grads_in_partition(self, param: Any, group_idx: int | None = None) -> None:
        super().copy_grads_in_partition(param, group_idx)
        group = param._hp_mapping.param_group_index if param._hp_mapping is not None else None
        if self.offload is None or group is None or not self.is_gradient_accumulation_boundary():
            return
        # In FP32 gradients of micro-batches are put together later, when all have been reduced.
        if self._use_compact_grad_partition_buffer(group):
            place = param._hp_mapping.hp_fragment_address
            flat = self.averaged_gradients[group].flat_partition
            self.offload.ready(param, flat.narrow(0, place.start, place.numel))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Norm, decision, update, gathering of weights: as DeepSpeed does it, without its masters."""
        assert self.offload is not None
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        self.overflow = False
        if self.check_grad_overflow:
            self.check_overflow(partition_gradients=self.partition_gradients)
        norm = None
        if not self.overflow:
            norm = self.scaled_global_norm()
            self.overflow = bool(is_invalid_grad_norm(norm))
        self._update_scale(self.overflow)
        if self.overflow or norm is None:
            self._global_grad_norm = float("inf")
            self.offload.discard()
            self._forget_gradients()
            return
        self._global_grad_norm = norm / self.loss_scale
        self.offload.update(self._gradients(), factor(float(norm), float(self.loss_scale), float(self.clip_grad)))
        self._forget_gradients()
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def _forget_gradients(self) -> None:
        self.zero_grad(set_to_none=True)
        for number in list(self.averaged_gradients):
            self.averaged_gradients[number] = None
            self.all_grad_tensors[number] = None

    def _rank(self, group: int) -> int:
        rank: int = dist.get_rank(group=self.real_dp_process_group[group])
        return rank
