"""What the configurations of Mamba and Mamba-2 in ``transformers`` have in common. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.exchange.architecture import Settings, Tree

if TYPE_CHECKING:
    from pretrain.models.hybrid.config import HybridConfig
    from pretrain.nn.mamba1_config import Mamba1Config
    from pretrain.nn.mamba2_config import Mamba2Config


def read_model(settings: Settings, symbol: str) -> Tree:
    """The model around mixers of one kind."""
    settings.only("hidden_act", "silu", "swish")
    settings.only_layers("linear_attention")
    return {
        "pattern": symbol * settings.layers(),
        "width": settings.whole("hidden_size"),
        "vocab_size": settings.whole("vocab_size"),
        "norm": {"eps": settings.number("layer_norm_epsilon")},
        "tied_embeddings": settings.flag("tie_word_embeddings"),
        "init_std": settings.number("initializer_range"),
        "residual_fp32": settings.flag("residual_in_fp32"),
    }


def mixer_options(settings: Settings, bias: str, limit: tuple[float, float] | None) -> Tree:
    """Biases and step limits of a state-space mixer, where they are not the default."""
    options: Tree = {}
    if settings.flag(bias):
        options["proj_bias"] = True
    if not settings.flag("use_conv_bias"):
        options["conv_bias"] = False
    if limit is not None:
        options["dt_limit"] = list(limit)
    return options


def write_model(config: HybridConfig, mixer: Mamba1Config | Mamba2Config) -> Tree:
    """What both classes write alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "state_size": mixer.state_dim,
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": config.norm.eps,
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_kernel,
        "use_bias": mixer.proj_bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "residual_in_fp32": config.residual_fp32,
        "tie_word_embeddings": config.tied_embeddings,
    }
