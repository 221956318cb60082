"""Log-likelihoods and greedy or sampled continuations of many token sequences in batches.

Shapes: L = sequence length, B = batch, V = vocabulary, C = tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.ops.keyed_random import keyed_generator

Pair = tuple[list[int], list[int]]
"""Tokens of a context (at least one) and of its continuation."""


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, pairs: Sequence[Pair], *, batch_size: int, max_length: int
) -> list[tuple[float, bool]]:
    """Log-probability (nats) of each continuation after its context, and whether each of its tokens is the likeliest.

    A model reads at most ``max_length`` tokens: longer pairs lose the beginning of their context. Pairs of like length
    go together, padded on the right, which no token before can see: the model must be causal. Logits are turned into
    probabilities in fp32, sums are float64.

    Raises:
        ValueError: for a pair without context, or a continuation that is longer than ``max_length``.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > max_length:
            raise ValueError(
                f"request {number}: a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                f"expected at least one and at most {max_length} tokens. What to do: a larger --max-length, if the "
                "model can read so much, or another task"
            )
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    device = next(model.parameters()).device
    # The model never reads the last token: nothing is asked about what follows it.
    inputs = [(context + continuation)[-(max_length + 1) :][:-1] for context, continuation in pairs]
    order = sorted((n for n in range(len(pairs)) if pairs[n][1]), key=lambda n: (-len(inputs[n]), n))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = len(inputs[chosen[0]])
        tokens_LB = torch.zeros(length, len(chosen), dtype=torch.long)
        for row, number in enumerate(chosen):
            tokens_LB[: len(inputs[number]), row] = torch.tensor(inputs[number])
        logits_LBV = model(tokens_LB.to(device))
        for row, number in enumerate(chosen):
            targets_C = torch.tensor(pairs[number][1], device=device)
            end = len(inputs[number])
            log_p_CV = logits_LBV[end - len(targets_C) : end, row].float().log_softmax(-1)
            total = log_p_CV.gather(1, targets_C.unsqueeze(1)).sum(dtype=torch.float64)
            found[number] = (float(total), bool((log_p_CV.argmax(-1) == targets_C).all()))
    return found


@torch.no_grad()
def continuations(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
    batch_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """New tokens of each prompt until ``ended(new tokens)`` or ``max_new_tokens``.

    Prompts of equal length are read together; no padding goes through the model. With a ``temperature`` above 0 tokens
    are drawn, keyed by (seed, number of the prompt, position), else the likeliest is taken.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for chosen in _by_length(prompts, batch_size):
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        cache = model.init_cache(len(chosen), dtype, device)
        prompts_LB = torch.tensor([prompts[number] for number in chosen], device=device).t()
        logits_BV = model.prefill(prompts_LB, cache)[-1]
        running = set(range(len(chosen)))
        for position in range(max_new_tokens):
            tokens = _choose(logits_BV, temperature, top_k, [(seed, number, position) for number in chosen])
            for row in sorted(running):
                new_tokens = found[chosen[row]]
                new_tokens.append(tokens[row])
                if ended(new_tokens):
                    running.discard(row)
            if not running or position + 1 == max_new_tokens:
                break
            logits_BV = model.decode(torch.tensor(tokens, device=device), cache)
    return found


def _by_length(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of prompts in batches of equal length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == batch_size or len(prompts[batch[0]]) != len(prompts[number])):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _choose(
    logits_BV: Tensor, temperature: float, top_k: int | None, keys: Sequence[tuple[int, int, int]]
) -> list[int]:
    if temperature == 0:
        return [int(token) for token in logits_BV.argmax(-1).tolist()]
    logits_BV = logits_BV.float().cpu() / temperature
    if top_k is not None and 0 < top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    drawn = []
    for probabilities_V, (seed, number, position) in zip(logits_BV.softmax(-1), keys, strict=True):
        generator = keyed_generator(seed, "evaluation", number, position)
        drawn.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    return drawn
