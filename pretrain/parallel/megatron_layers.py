"""Megatron-Core's tensor-parallel layers behind :class:`pretrain.parallel.layers.ParallelLayers`.

Importing this module imports Megatron-Core; call ``import_megatron`` of :mod:`pretrain.parallel.megatron_import` and
initialise Megatron's model-parallel groups first. Parameters are left uninitialised: values come from the canonical
initialisation (:mod:`pretrain.nn.initialisation`), which draws the same logical tensors on every layout.

Each split parameter carries two marks: its canonical split, for checkpoints and initialisation, and Megatron's own
attributes, from which Megatron computes gradient norms (a parameter without them counts as a copy, and only that of
tensor-parallel rank 0 enters the norm) and sums the gradients of parameters used on shares of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from pretrain.parallel.canonical import Split, mark_split
from pretrain.parallel.layers import exempt_from_muon, exempt_from_weight_decay
from pretrain.parallel.vocabulary import VocabularyShard


class _Column(ColumnParallelLinear):
    """Output features split; Megatron's (output, bias) pair reduced to the output."""

    def forward(self, x: Tensor) -> Tensor:
        output, _ = super().forward(x)
        return output


class _FusedColumn(_Column):
    """Column layer whose local matrix stacks this rank's share of each component.

    A plain column layer cuts the stacked matrix in contiguous rows, so that its ranks would hold different components.
    """

    def __init__(self, d_in: int, components: Mapping[str, int], tensor_size: int, **options: Any) -> None:
        super().__init__(d_in, sum(components.values()), **options)
        local = {name: rows // tensor_size for name, rows in components.items()}
        names = ["weight"] if self.bias is None else ["weight", "bias"]
        self.canonical_components = {name: dict(local) for name in names}


class _Row(RowParallelLinear):
    """Input features split; Megatron's (output, bias) pair reduced to the output."""

    def forward(self, x: Tensor) -> Tensor:
        output, _ = super().forward(x)
        return output


class _Embedding(VocabParallelEmbedding):
    """Rows split: int [L, B] -> [L, B, D], or this rank's share of the sequence."""

    def forward(self, tokens_LB: Tensor) -> Tensor:
        # Megatron takes batch-first ids where it scatters the sequence, and turns the result round.
        return super().forward(tokens_LB.t() if self.reduce_scatter_embeddings else tokens_LB)


class MegatronLayers:
    """Layers split over Megatron's tensor-parallel group.

    Args:
        config: Megatron's settings, with ``perform_initialization`` off; ``params_dtype``, ``sequence_parallel`` and
            ``use_cpu_initialization`` (where the parameters are allocated) are honoured.
    """

    def __init__(self, config: ModelParallelConfig) -> None:
        assert not config.perform_initialization, "values come from the canonical initialisation"
        self._config = config
        self._group = parallel_state.get_tensor_model_parallel_group()
        self.tensor_rank: int = self._group.rank()
        self.tensor_size: int = self._group.size()
        self.sequence_parallel: bool = config.sequence_parallel and self.tensor_size > 1

    def local(self, count: int) -> int:
        assert count % self.tensor_size == 0, f"{count} does not split over {self.tensor_size} tensor-parallel ranks"
        return count // self.tensor_size

    def column(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        return self._mark_column(_Column(d_in, d_out, **self._column_options(bias)))

    def fused_column(self, d_in: int, components: Mapping[str, int], bias: bool = False) -> nn.Module:
        for rows in components.values():
            self.local(rows)
        return self._mark_column(_FusedColumn(d_in, components, self.tensor_size, **self._column_options(bias)))

    def row(self, d_in: int, d_out: int, bias: bool = False) -> nn.Module:
        layer = _Row(d_in, d_out, bias=bias, input_is_parallel=True, skip_bias_add=False, **self._options())
        self.own(layer.weight, dim=1)
        if bias:
            exempt_from_weight_decay(self.replicated(layer.bias))
        return layer

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        self.local(vocab_size)
        layer = _Embedding(vocab_size, width, reduce_scatter_embeddings=self.sequence_parallel, **self._options())
        exempt_from_muon(self.own(layer.weight))
        return layer

    def head(self, width: int, vocab_size: int) -> nn.Module:
        layer = _Column(width, vocab_size, **self._column_options(bias=False))
        exempt_from_muon(layer.weight)
        return self._mark_column(layer)

    def tied_logits(self, x_LBD: Tensor, embedding_weight: Tensor) -> Tensor:
        trained = embedding_weight.requires_grad
        linear = linear_with_grad_accumulation_and_async_allreduce if trained else linear_with_frozen_weight
        return linear(
            x_LBD,
            embedding_weight,
            None,
            gradient_accumulation_fusion=self._config.gradient_accumulation_fusion,
            allreduce_dgrad=self.tensor_size > 1 and not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
            tp_group=self._group,
        )

    def own(self, parameter: nn.Parameter, dim: int = 0) -> nn.Parameter:
        # Megatron sets these together with the initial values of its own layers, which is off here.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
        return mark_split(parameter, Split(dim, self.tensor_rank, self.tensor_size))

    def replicated(self, parameter: nn.Parameter) -> nn.Parameter:
        parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self._group)
        return copy_to_tensor_model_parallel_region(x, group=self._group)

    def leave(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self._group)
        return reduce_from_tensor_model_parallel_region(x, group=self._group)

    def sum_inside(self, x: Tensor) -> Tensor:
        summed = reduce_from_tensor_model_parallel_region(x, group=self._group)
        return copy_to_tensor_model_parallel_region(summed, group=self._group)

    def whole_inside(self, parameter: nn.Parameter) -> Tensor:
        return copy_to_tensor_model_parallel_region(parameter, group=self._group)

    def vocabulary(self, vocab_size: int) -> VocabularyShard | None:
        if self.tensor_size == 1:
            return None
        rows = self.local(vocab_size)
        return VocabularyShard(self.tensor_rank * rows, (self.tensor_rank + 1) * rows, self._group)

    def _mark_column(self, layer: _Column) -> nn.Module:
        self.own(layer.weight)
        if layer.bias is not None:
            exempt_from_weight_decay(self.own(layer.bias))
        return layer

    def _column_options(self, bias: bool) -> dict[str, Any]:
        return {"bias": bias, "gather_output": False, "skip_bias_add": False, **self._options()}

    def _options(self) -> dict[str, Any]:
        # Megatron wants an initialiser and calls it only when it initialises.
        return {"config": self._config, "init_method": None, "tp_group": self._group}
