"""Accuracy and exact match of the next-token objective, counted by hand and over a split vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.objectives.accuracy import hits, most_likely_tokens, whole_answers
from pretrain.objectives.config import NextTokenConfig
from pretrain.parallel.vocabulary import VocabularyShard

# Rows of targets; the model's first choice is always 1. "x": a target, "-": none.
TARGETS = [[1, 1, 2, 1, 1, 1], [1, 2, 1, 1, 3, 1]]
MASK = ["xx-x-x", "xxxx-x"]
DOCUMENTS = [[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]]


class One:
    """Always says 1, in logits [L, B, 5]; other tokens get noise below."""

    def __call__(self, tokens_LB: torch.Tensor, *_: Any) -> torch.Tensor:
        logits = torch.rand(*tokens_LB.shape, 5, generator=torch.Generator().manual_seed(0))
        logits[..., 1] = 2.0
        return logits


def batch() -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.zeros(2, 6, dtype=torch.int32),
        "targets": torch.tensor(TARGETS, dtype=torch.int32),
        "loss_mask": torch.tensor([[mark == "x" for mark in row] for row in MASK]),
        "seq_idx": torch.tensor(DOCUMENTS, dtype=torch.int32),
        "position_ids": torch.arange(6, dtype=torch.int32).repeat(2, 1),
    }


def test_hits_and_whole_answers_are_counted() -> None:
    objective = NextTokenConfig(accuracy=True, exact_match=True).build()
    metrics = objective(One(), batch()).metrics
    # Row 0: answers (1 1), (1), (1), all right. Row 1: (1 2) of document 0 is wrong, (1 1) and (1) of document 1 are
    # right: neighbours of different documents are different answers.
    assert metrics == {"accuracy": torch.tensor(8.0), "exact_match": torch.tensor(7.0)}
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("training", [True, False])
def test_they_are_reported_beside_the_z_loss_and_when_asked_only(training: bool) -> None:
    with torch.set_grad_enabled(training):
        both = NextTokenConfig(accuracy=True, z_loss=1e-4).build()(One(), batch()).metrics
        none = NextTokenConfig().build()(One(), batch()).metrics
    assert set(both) == {"accuracy"} | ({"cross_entropy", "z_loss"} if training else set())
    assert none == {}


def test_a_batch_without_targets_has_no_hits() -> None:
    empty = batch() | {"loss_mask": torch.zeros(2, 6, dtype=torch.bool)}
    metrics = NextTokenConfig(accuracy=True, exact_match=True).build()(One(), empty).metrics
    assert metrics == {"accuracy": torch.tensor(0.0), "exact_match": torch.tensor(0.0)}


def test_answers_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(40, 7, generator=generator) < 0.7
    right = (torch.rand(40, 7, generator=generator) < 0.8) & mask
    documents = (torch.rand(40, 7, generator=generator) < 0.1).cumsum(0)
    found = whole_answers(right, mask, documents)
    for row in range(7):
        place = 0
        while place < 40:
            end = place + 1
            if mask[place, row]:
                while end < 40 and mask[end, row] and documents[end, row] == documents[place, row]:
                    end += 1
                expected = bool(right[place:end, row].all())
                assert found[place:end, row].tolist() == [expected] * (end - place)
            else:
                assert not found[place, row]
            place = end


def split_choices(rank: int, size: int, dtype: torch.dtype) -> tuple[list[int], list[list[bool]]]:
    logits = torch.randn(90, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    width = 24 // size
    shard = VocabularyShard(rank * width, (rank + 1) * width, dist.group.WORLD)
    local = logits[:, shard.start : shard.stop]
    targets = logits.argmax(-1).view(30, 3) * (torch.arange(3) != 1)  # of the middle column, mostly wrong
    mask = torch.arange(30).unsqueeze(1) % 4 != torch.zeros(3)
    return most_likely_tokens(local, shard).tolist(), hits(local.view(30, 3, -1), targets, mask, shard).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_split_vocabulary_gives_the_same_on_every_rank(worker_pools: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(90, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    top = logits.max(-1, keepdim=True).values
    for chosen, right in worker_pools(2).run(split_choices, dtype):
        # One of the largest: in bf16 some are equal.
        assert torch.equal(logits.gather(1, torch.tensor(chosen).unsqueeze(1)), top)
        right_LB = torch.tensor(right)
        assert not right_LB[::4].any()
        if dtype == torch.float32:
            assert chosen == logits.argmax(-1).tolist()
            assert right_LB[torch.arange(30) % 4 != 0][:, [0, 2]].all()
