"""Cost of the hybrid language model, from its configuration alone. Torch-free."""

from __future__ import annotations

from pretrain.models.hybrid.config import HybridConfig
from pretrain.nn.cost import Cost, linear_cost


def layer_cost(config: HybridConfig, layer: int, sequence_length: int, bytes_per_value: int = 2) -> Cost:
    """Cost of one layer (sublayer and its norm) in sequences of ``sequence_length`` tokens."""
    mixer = config.mixer(config.pattern[layer])
    return Cost(config.width) + mixer.cost(config.place(layer), sequence_length, bytes_per_value)


def model_cost(config: HybridConfig, sequence_length: int, bytes_per_value: int = 2) -> Cost:
    """Cost of the whole model: embedding (no FLOPs), layers, final norm and output head."""
    total = Cost(config.vocab_size * config.width) + Cost(config.width)
    head = linear_cost(config.width, config.vocab_size)
    total += Cost(0, head.flops_per_token) if config.tied_embeddings else head
    for layer in range(config.num_layers):
        total += layer_cost(config, layer, sequence_length, bytes_per_value)
    return total
