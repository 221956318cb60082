"""Sampling from a recurrent language model: the prompt is read once, then each token costs one step.

Shapes: L = sequence length, B = batch, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.ops.keyed_random import keyed_generator


class RecurrentLM(Protocol):
    """A model that continues from a cache, such as :class:`pretrain.models.hybrid.model.HybridLM`."""

    def init_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Empty cache."""
        ...

    def prefill(self, tokens_LB: Tensor, cache: Any) -> Tensor:
        """Read a prompt into an empty cache; logits_LBV."""
        ...

    def decode(self, tokens_B: Tensor, cache: Any) -> Tensor:
        """Read one more token a row; logits_BV."""
        ...


@torch.no_grad()
def generate(
    model: RecurrentLM,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[int]:
    """Continue one prompt.

    Args:
        model: an ``nn.Module`` with the :class:`RecurrentLM` methods; left in the mode (train or eval) it was
            in.
        prompt_tokens: at least one token.
        max_new_tokens: upper limit of new tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; None for all.
        seed: together with the number of tokens drawn before, keys each draw, so a longer run starts like a
            shorter one.
        stop_token: ends the text when drawn, and is returned as its last token.

    Returns:
        The new tokens, without the prompt.

    Raises:
        ValueError: for an empty prompt, a negative temperature or ``top_k`` < 1.
    """
    if not prompt_tokens:
        raise ValueError("prompt_tokens: found an empty prompt, expected at least one token; use a separator token")
    if temperature < 0:
        raise ValueError(f"temperature: found {temperature}, expected 0 (most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: found {top_k}, expected at least 1, or None for all tokens")
    assert isinstance(model, nn.Module)
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        cache = model.init_cache(1, parameter.dtype, parameter.device)
        prompt_LB = torch.tensor(prompt_tokens, dtype=torch.long, device=parameter.device).unsqueeze(1)
        logits_V = model.prefill(prompt_LB, cache)[-1, 0]
        new_tokens: list[int] = []
        while len(new_tokens) < max_new_tokens:
            token = _draw(logits_V, temperature, top_k, seed, len(new_tokens))
            new_tokens.append(token)
            if token == stop_token or len(new_tokens) == max_new_tokens:
                break
            logits_V = model.decode(torch.tensor([token], device=parameter.device), cache)[0]
    finally:
        model.train(was_training)
    return new_tokens


def _draw(logits_V: Tensor, temperature: float, top_k: int | None, seed: int, index: int) -> int:
    logits_V = logits_V.float().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if top_k is not None and top_k < len(logits_V):
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    generator = keyed_generator(seed, "generation", index)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
