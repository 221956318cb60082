"""Validation over several data-parallel ranks, each run here by itself: what a rank is asked, and what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.training.evaluate import evaluate


class Rank:
    device = torch.device("cpu")

    def __init__(self, dp_rank: int, dp_size: int, is_data_leader: bool = True) -> None:
        self.dp_rank, self.dp_size, self.is_data_leader = dp_rank, dp_size, is_data_leader
        self.rows: list[int] = []
        self.counted: list[int] = []

    def eval_step(self, batch: dict[str, torch.Tensor], loss: Any) -> float:
        self.rows.append(len(batch["index"]))
        return float(batch["index"].sum())

    def denominator(self, batch: dict[str, torch.Tensor]) -> float:
        """The objective's part: asked for samples that count, and for no others."""
        self.counted += batch["index"].tolist()
        return float(len(batch["index"]))


class Source:
    num_bytes = None

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        return {"index": np.array(indices)}


@pytest.mark.parametrize("total", [1, 3, 7, 8, 12, 23])
@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 4), (2, 2), (3, 4), (4, 3)])
def test_ranks_make_the_same_calls_and_every_sample_counts_once(total: int, batch_size: int, dp_size: int) -> None:
    ranks = [Rank(rank, dp_size) for rank in range(dp_size)]
    for rank in ranks:
        metrics = evaluate(rank, rank, Source(total), batch_size=batch_size)  # type: ignore[arg-type]
        assert metrics == {"validation_loss": pytest.approx(sum(rank.counted) / max(len(rank.counted), 1))}
    assert all(rank.rows == ranks[0].rows for rank in ranks)
    assert max(ranks[0].rows) <= batch_size
    assert sorted(index for rank in ranks for index in rank.counted) == list(range(total))
    # Dealt in turn, so that shares differ by one at most.
    assert all(index % dp_size == rank.dp_rank for rank in ranks for index in rank.counted)


def test_ranks_that_are_no_data_leaders_take_part_without_counting() -> None:
    leader, follower = Rank(1, 2), Rank(1, 2, is_data_leader=False)
    for rank in (leader, follower):
        evaluate(rank, rank, Source(9), batch_size=2)  # type: ignore[arg-type]
    assert follower.rows == leader.rows
    assert (leader.counted, follower.counted) == ([1, 3, 5, 7], [])
