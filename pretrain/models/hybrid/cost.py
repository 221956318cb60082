"""Parameters and forward FLOPs of the hybrid language model, from its configuration alone. Torch-free."""

from __future__ import annotations

from pretrain.models.hybrid.config import HybridConfig
from pretrain.nn.cost import Cost, attention_cost, linear_cost, mamba2_cost, mlp_cost, norm_cost


def layer_cost(config: HybridConfig, symbol: str, sequence_length: int) -> Cost:
    """Cost of one layer (sublayer and its norm) of kind ``symbol`` at sequences of ``sequence_length``
    tokens.
    """
    if symbol == "M":
        mixer = mamba2_cost(
            config.width,
            config.mamba_inner,
            config.mamba_head_dim,
            config.mamba_state_dim,
            config.mamba_groups,
            config.mamba_conv_kernel,
            min(config.mamba_chunk_size, sequence_length),
        )
    elif symbol == "*":
        heads, kv_heads, head_dim = config.num_heads, config.attention_kv_heads, config.attention_head_dim
        mixer = attention_cost(config.width, heads, kv_heads, head_dim, sequence_length)
    else:
        mixer = mlp_cost(config.width, config.mlp_hidden, gated=config.mlp_activation == "swiglu")
    return norm_cost(config.width) + mixer


def model_cost(config: HybridConfig, sequence_length: int) -> Cost:
    """Cost of the whole model: embedding (no FLOPs), layers, final norm and output head."""
    total = Cost(config.vocab_size * config.width, 0) + norm_cost(config.width)
    head = linear_cost(config.width, config.vocab_size)
    total += Cost(0, head.flops_per_token) if config.tied_embeddings else head
    for symbol in config.pattern:
        total += layer_cost(config, symbol, sequence_length)
    return total
