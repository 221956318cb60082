"""From a checked configuration to an engine with an initialised model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from pretrain.config.components import build_component
from pretrain.config.schema import Config, MegatronConfig
from pretrain.engines.base import Engine
from pretrain.parallel.stage import Stage


def build_engine(config: Config, device: torch.device) -> Engine:
    """The engine that ``config.engine`` names, on ``device``; the default process group must exist."""
    if isinstance(config.engine, MegatronConfig):
        from pretrain.engines.megatron import MegatronEngine

        def build(layers: Any, stage: Stage) -> nn.Module:
            return _initialised(build_component(config.model, layers=layers, stage=stage), config)

        return MegatronEngine(build, megatron_stages(config), config, device)
    from pretrain.engines.deepspeed import DeepSpeedEngine
    from pretrain.parallel.layers import TorchLayers

    return DeepSpeedEngine(_initialised(build_component(config.model, layers=TorchLayers()), config), config, device)


def megatron_stages(config: Config) -> list[list[Stage]]:
    """The stages of each pipeline rank, in the order of its chunks."""
    from pretrain.parallel.pipeline import pipeline_stages

    assert isinstance(config.engine, MegatronConfig)
    model, engine = config.model, config.engine
    return pipeline_stages(
        model.num_layers,
        model.layer_costs(sequence_length(config)),
        model.end_costs(),
        engine.pipeline_parallel,
        engine.virtual_pipeline,
        engine.pipeline_split,
    )


def sequence_length(config: Config) -> int:
    """Tokens of a training sequence, for costs; data that does not tell counts as short."""
    return getattr(config.data, "sequence_length", None) or 1


def _initialised(model: nn.Module, config: Config) -> nn.Module:
    """``model`` with its initial values."""
    reset = getattr(model, "reset_parameters", None)
    # torch's own modules have a method of this name without a seed; such a model comes initialised.
    if reset is not None and inspect.signature(reset).parameters:
        reset(config.run.seed)
    return model
