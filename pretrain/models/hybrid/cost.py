"""Cost of the hybrid language model, from its configuration alone. Torch-free.

Activation bytes are those of a training step on one device: with the token ids that the embedding keeps, and the logits
that the loss keeps (:mod:`pretrain.objectives.cross_entropy` keeps them as they are).
"""

from __future__ import annotations

from pretrain.models.hybrid.config import HybridConfig
from pretrain.nn.cost import FP32, Cost, linear_cost

TOKEN_ID = 8
"""Bytes of a token id (int64)."""

EMBEDDING, NORMS, HEAD = "embedding", "norms", "head"
"""Parts of a model besides the kinds of its layers."""


def layer_cost(config: HybridConfig, layer: int, sequence_length: int, bytes_per_value: int = 2) -> Cost:
    """Cost of one layer (sublayer and its norms) in sequences of ``sequence_length`` tokens."""
    mixer = config.mixer(config.layer_pattern[layer])
    norms = config.norm.layer_cost(config.width, bytes_per_value, residual_bytes(config, bytes_per_value))
    return norms + mixer.cost(config.place(layer), sequence_length, bytes_per_value)


def residual_bytes(config: HybridConfig, bytes_per_value: int) -> int:
    """Bytes of a value of the residual stream."""
    return max(FP32, bytes_per_value) if config.residual_fp32 else bytes_per_value


def cost_by_part(config: HybridConfig, sequence_length: int, bytes_per_value: int = 2) -> dict[str, Cost]:
    """Cost of the embedding (a lookup, no FLOPs), of all layers of each kind by its label, of all norms of the residual
    stream and of the head with the logits. A matrix that embedding and head share counts with the embedding.
    """
    width, vocab_size, stream = config.width, config.vocab_size, residual_bytes(config, bytes_per_value)
    parts = {EMBEDDING: Cost(parameters=vocab_size * width, activation_bytes_per_token=TOKEN_ID)}
    norms = config.norm.end_cost(width, bytes_per_value, stream)
    for layer, symbol in enumerate(config.layer_pattern):
        mixer = config.mixer(symbol)
        cost = mixer.cost(config.place(layer), sequence_length, bytes_per_value)
        parts[mixer.label] = parts.get(mixer.label, Cost()) + cost
        norms += config.norm.layer_cost(width, bytes_per_value, stream)
    head = linear_cost(width, vocab_size)
    # Its input, the logits (a soft cap keeps none of its own), targets and log-normalisers.
    kept = bytes_per_value * (width + vocab_size) + TOKEN_ID + FP32
    parts[NORMS] = norms
    parts[HEAD] = Cost(0 if config.tied_embeddings else head.parameters, head.flops_per_token, 0, kept)
    return parts


def model_cost(config: HybridConfig, sequence_length: int, bytes_per_value: int = 2) -> Cost:
    """Cost of the whole model, the sum of :func:`cost_by_part`."""
    return sum(cost_by_part(config, sequence_length, bytes_per_value).values(), start=Cost())
