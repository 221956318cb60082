"""Batched scoring and generation against the model's own logits, one text at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hybrid import hybrid

from pretrain.evaluation.scoring import continuations, log_likelihoods
from pretrain.models.generation import generate
from pretrain.parallel.layers import TorchLayers

VOCABULARY = 50


@pytest.fixture(scope="module", params=["M*-", "*-*-", "MM"])
def model(request: pytest.FixtureRequest) -> Any:
    config = hybrid(
        request.param,
        32,
        VOCABULARY,
        attention__num_heads=4,
        attention__rope_theta=10000.0,
        mamba2__head_dim=16,
        mamba2__state_dim=8,
        mamba2__chunk_size=8,
        init_std=0.2,
    )
    built = config.build(TorchLayers())
    built.reset_parameters(3)
    return built.eval()


def texts(count: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [(some(1, 30), some(1, 9)) for _ in range(count)]


@torch.no_grad()
def alone(model: Any, context: list[int], continuation: list[int], max_length: int) -> tuple[float, bool]:
    """The definition, without padding: token after token given all before it, in float64."""
    tokens = (context + continuation)[-max_length - 1 :]
    logits = model(torch.tensor(tokens).unsqueeze(1)).squeeze(1).double()
    first = len(tokens) - len(continuation)
    total, greedy = 0.0, True
    for place in range(first, len(tokens)):
        row = logits[place - 1]
        total += float(row[tokens[place]] - row.logsumexp(-1))
        greedy &= int(row.argmax()) == tokens[place]
    return total, greedy


@pytest.mark.parametrize("max_length", [100, 16])
def test_likelihoods_in_batches_are_those_of_each_text_alone(model: Any, max_length: int) -> None:
    pairs = texts(13)
    # One continuation that is the model's own choice, so that both answers about greediness occur.
    context = pairs[0][0][:10]
    pairs.append((context, generate(model, context, 5, temperature=0)))
    found = log_likelihoods(model, pairs, batch_size=4, max_length=max_length)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = alone(model, context, continuation, max_length)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert found[-1][1]
    assert not all(greedy for _, greedy in found)


def test_what_no_window_holds_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"request 1: a context of 1 and a continuation of 6 tokens.*at most 5"):
        log_likelihoods(model, [([1], [2]), ([1], [2] * 6)], batch_size=2, max_length=5)
    with pytest.raises(ValueError, match="request 0: a context of 0"):
        log_likelihoods(model, [([], [2])], batch_size=2, max_length=5)


def test_generation_in_batches_is_that_of_each_prompt_alone(model: Any) -> None:
    prompts = [context for context, _ in texts(9)] + [[5, 6, 7], [8, 9, 10], [1, 2, 3]]

    def ended(new_tokens: list[int]) -> bool:
        return new_tokens[-1] % 7 == 0

    found = continuations(model, prompts, max_new_tokens=12, ended=ended, batch_size=4)
    for prompt, new_tokens in zip(prompts, found, strict=True):
        greedy = generate(model, prompt, 12, temperature=0)
        stop = next((place + 1 for place, token in enumerate(greedy) if token % 7 == 0), 12)
        assert new_tokens == greedy[:stop]


def test_sampled_text_depends_on_the_prompt_not_on_its_batch(model: Any) -> None:
    prompts = [[5, 6, 7], [8, 9, 10], [1, 2, 3, 4]]

    def sample(batch_size: int, seed: int) -> list[list[int]]:
        return continuations(
            model, prompts, max_new_tokens=6, ended=lambda _: False, batch_size=batch_size, temperature=1.0, seed=seed
        )

    assert sample(1, 0) == sample(3, 0)
    assert sample(1, 0) != sample(1, 1)
    assert all(len(tokens) == 6 for tokens in sample(1, 0))
