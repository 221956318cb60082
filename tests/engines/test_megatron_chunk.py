"""The model as Megatron-Core's schedules see it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from pretrain.engines.megatron_chunk import PipelineChunk, StageModel, StageOutput
from pretrain.parallel.stage import Stage


class Doubling(nn.Module):
    def forward(self, tokens: torch.Tensor, hidden_LBD: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * (tokens if hidden_LBD is None else hidden_LBD)


@pytest.fixture(autouse=True)
def enums(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = types.SimpleNamespace(encoder_or_decoder=1)  # type: ignore[attr-defined]
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)


def chunk(has_embedding: bool, has_head: bool) -> PipelineChunk:
    return PipelineChunk(Doubling(), Stage(0, 1, has_embedding, has_head), None, False)


def test_a_stage_without_head_leaves_the_objective_with_its_hidden_states() -> None:
    first = chunk(has_embedding=True, has_head=False)
    with pytest.raises(StageOutput) as left:
        StageModel(first, first, split_vocabulary=True)(torch.ones(2))
    assert left.value.hidden_LBD.tolist() == [2.0, 2.0]


def test_a_second_call_of_a_stage_is_refused_instead_of_answered_with_old_states() -> None:
    last = chunk(has_embedding=False, has_head=True)
    model = StageModel(last, last, split_vocabulary=True)
    last.set_input_tensor([torch.full((2,), 3.0)])
    assert model(torch.ones(2)).tolist() == [6.0, 6.0]
    with pytest.raises(ValueError, match="calls the model more than once"):
        model(torch.ones(2))
