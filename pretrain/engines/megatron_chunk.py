"""Our model as Megatron-Core's schedules want to see it, and the objective on any of its stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.parallel.stage import Stage


class StageOutput(Exception):  # noqa: N818
    """Leaves the objective with the hidden states of a stage that has no head.

    An objective is a function of one call of the model. Where the model ends in another process there is nothing to
    compute after that call, whatever the objective is.
    """

    def __init__(self, hidden_LBD: Tensor) -> None:
        super().__init__("the model goes on in another stage")
        self.hidden_LBD = hidden_LBD


class PipelineChunk(nn.Module):
    """One chunk of the model with the attributes that schedules and gradient finalisation look up."""

    def __init__(self, module: nn.Module, stage: Stage, config: Any, tied_over_stages: bool) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.model_type = ModelType.encoder_or_decoder  # one stack of layers
        self.module = module
        self.stage = stage
        self.config = config
        self.pre_process = stage.has_embedding
        self.post_process = stage.has_head
        # Gradients of tied embeddings are summed over the first and the last stage when those are two.
        self.share_embeddings_and_output_weights = tied_over_stages
        self._input_LBD: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Hidden states from the stage before, handed over by the schedule."""
        self._input_LBD = tensors[0]

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The embedding that first and last stage both hold."""
        return self.module.embedding.weight  # type: ignore[union-attr,return-value]

    def forward(self, *arguments: Any) -> Tensor:
        """The model's own forward pass on this stage: logits, or hidden states for the next stage."""
        if self.stage.has_embedding:
            return self.module(*arguments)
        hidden_LBD, self._input_LBD = self._input_LBD, None
        if hidden_LBD is None:
            raise ValueError(
                "objective: it calls the model more than once, but a pipeline stage gets the states of one forward "
                "pass; call the model once for each micro-batch, or set engine.pipeline_parallel=1"
            )
        return self.module(*arguments, hidden_LBD=hidden_LBD)


class StageModel:
    """The model as an objective calls it, on one stage.

    Logits are gathered over tensor-parallel ranks, so that any objective sees the whole vocabulary, unless the
    objective says that it works on shards (``split_vocabulary``).

    Raises (on calling):
        StageOutput: the stage has no head.
    """

    def __init__(self, wrapped: Any, chunk: PipelineChunk, split_vocabulary: bool) -> None:
        self._wrapped = wrapped
        self._chunk = chunk
        shard = getattr(chunk.module, "vocabulary", None)
        self.vocabulary: Any = shard if split_vocabulary else None
        """How the logits are split over tensor-parallel ranks; None: they are whole."""
        self._gathers = shard is not None and not split_vocabulary

    @property
    def training(self) -> bool:
        return self._chunk.training

    def __call__(self, *arguments: Any) -> Tensor:
        output = self._wrapped(*arguments)
        if not self._chunk.stage.has_head:
            raise StageOutput(output)
        if self._gathers:
            from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

            return gather_from_tensor_model_parallel_region(output)
        return output


def zero_tokens(device: torch.device) -> Tensor:
    """The token count that tells Megatron to divide by nothing: our losses are divided already."""
    return torch.zeros((), dtype=torch.int, device=device)
