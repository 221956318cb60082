"""Parameter counts of the shipped configurations, on the meta device, against published figures and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from pretrain.config.components import check_component
from pretrain.config.typecheck import Report
from pretrain.models.hybrid.config import HybridConfig
from pretrain.models.hybrid.cost import model_cost
from pretrain.parallel.layers import TorchLayers

CONFIGS = Path(__file__).parents[2] / "configs" / "model"

EXACT = {
    # Of the safetensors files of state-spaces/mamba-*-hf on the Hugging Face hub.
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    # Of the 507 tensors of nvidia/mamba2-8b-3t-4k.
    "mamba2_8b": 8_236_999_680,
    # Of nvidia/Nemotron-H-8B-Base-8K.
    "nemotron_h_8b": 8_100_852_736,
}

ROUNDED = {
    # Their names: arXiv 2405.21060, table 10, and state-spaces/mamba2-*.
    "mamba2_130m": 130e6,
    "mamba2_370m": 370e6,
    "mamba2_780m": 780e6,
    "mamba2_1_3b": 1.3e9,
    "mamba2_2_7b": 2.7e9,
    # arXiv 2406.07887 gives 8B for all four; the second figure is a count of its shapes.
    "mamba2_hybrid_8b": 8.65e9,
    "transformer_8b": 8.54e9,
    "mamba_8b": 8.2e9,
}


def shipped(name: str) -> HybridConfig:
    report = Report()
    config = check_component(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), "model", report)
    assert report.violations == []
    assert isinstance(config, HybridConfig)
    return config


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(config: HybridConfig) -> int:
    with torch.device("meta"):
        return parameters(config.build(TorchLayers()))


@pytest.mark.parametrize(("name", "published"), EXACT.items())
def test_parameters_are_those_of_the_published_weights(name, published):
    config = shipped(name)
    assert built(config) == published
    assert model_cost(config, 512).parameters == published


@pytest.mark.parametrize(("name", "published"), ROUNDED.items())
def test_parameters_round_to_the_published_size(name, published):
    config = shipped(name)
    found = built(config)
    assert found == pytest.approx(published, rel=0.035 if name == "mamba2_1_3b" else 0.01)
    assert model_cost(config, 512).parameters == found


def theirs(name: str, config: HybridConfig) -> int:
    """Parameters of the transformers class with the sizes that the publication gives, written out again."""
    common: dict[str, Any] = {
        "hidden_size": config.width,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
    }
    layers = config.num_layers
    if name.startswith("mamba_"):
        state = 128 if name == "mamba_8b" else 16
        theirs = transformers.MambaConfig(**common, num_hidden_layers=layers, state_size=state, expand=2, conv_kernel=4)
    elif name.startswith("mamba2_") and "hybrid" not in name:
        groups = 8 if name == "mamba2_8b" else 1
        theirs = transformers.Mamba2Config(
            **common, num_hidden_layers=layers, num_heads=config.width * 2 // 64, head_dim=64, n_groups=groups
        )
    elif name == "transformer_8b":
        theirs = transformers.NemotronConfig(
            **common,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            intermediate_size=16384,
        )
    else:
        hidden = 21504 if name == "nemotron_h_8b" else 16384
        theirs = transformers.NemotronHConfig(
            **common, hybrid_override_pattern=config.layer_pattern, intermediate_size=hidden
        )
    with torch.device("meta"):
        return parameters(transformers.AutoModelForCausalLM.from_config(theirs))


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_parameters_are_those_of_the_transformers_class(name):
    config = shipped(name)
    assert model_cost(config, 512).parameters == theirs(name, config)


def test_every_shipped_model_is_valid_and_builds_as_large_as_its_cost_says():
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert set(EXACT) | set(ROUNDED) < set(names)
    for name in names:
        config = shipped(name)
        assert built(config) == model_cost(config, 512).parameters, name


def test_the_four_models_of_one_study_share_width_vocabulary_and_size():
    study = [shipped(name) for name in ("mamba2_hybrid_8b", "mamba_8b", "mamba2_8b", "transformer_8b")]
    assert {config.width for config in study} == {4096}
    assert {config.vocab_size for config in study} == {256_000}
    sizes = [model_cost(config, 512).parameters for config in study]
    assert max(sizes) < 1.07 * min(sizes)
    assert study[0].layer_pattern == "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
