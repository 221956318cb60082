"""Tensor-parallel layers in a worker process, and the comparison of their shares with whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.parallel.canonical import Part, canonical_parameters


def megatron_layers(size: int, sequence_parallel: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """``MegatronLayers`` over tensor-parallel groups of ``size`` workers."""
    from pretrain.parallel.megatron_import import import_megatron

    import_megatron("cpu")
    from megatron.core.model_parallel_config import ModelParallelConfig

    from pretrain.parallel.megatron_groups import start_model_parallel
    from pretrain.parallel.megatron_layers import MegatronLayers

    start_model_parallel(tensor_model_parallel_size=size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    return MegatronLayers(config)


def share(part: Part, whole: Tensor, rank: int, size: int) -> Tensor:
    """What rank ``rank`` should hold of ``whole``, the logical tensor of ``part``."""
    assert tuple(whole.shape) == part.shape, f"{part.name}: {tuple(whole.shape)} is not {part.shape}"
    split = [d for d, (n, local) in enumerate(zip(part.shape, part.local_shape, strict=True)) if n != local]
    return whole.chunk(size, split[0])[rank] if split else whole


def parts_of(model: nn.Module, gradients: bool = False) -> dict[str, tuple[Part, Tensor]]:
    """Every logical tensor's part and local values (or gradient) by canonical name."""
    found = {}
    for parameter in canonical_parameters(model):
        tensor = parameter.tensor.grad if gradients else parameter.tensor.data
        assert tensor is not None, f"{parameter.module_name} has no gradient"
        for part in parameter.parts:
            found[part.name] = part, tensor.reshape(-1)[part.start : part.stop].view(part.local_shape)
    return found


def copy_shares(whole: nn.Module, local: nn.Module, rank: int, size: int) -> None:
    """Give ``local`` its share of the weights of ``whole``."""
    values = parts_of(whole)
    for name, (part, tensor) in parts_of(local).items():
        tensor.copy_(share(part, values[name][1], rank, size))


def sum_replicated_gradients(model: Any, sequence_parallel: bool) -> None:
    """Megatron's sum of the gradients of parameters that worked on a share of the sequence."""
    from types import SimpleNamespace

    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    config: Any = SimpleNamespace(sequence_parallel=sequence_parallel, qk_layernorm=False)
    _allreduce_non_tensor_model_parallel_grads([model], config)
