"""Validation over several data-parallel ranks, each run here by itself: what a rank is asked, and what counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.source import SourcePart
from pretrain.engines.base import EvalResult
from pretrain.training.evaluate import evaluate


class Rank:
    device = torch.device("cpu")

    def __init__(self, dp_rank: int, dp_size: int, is_data_leader: bool = True) -> None:
        self.dp_rank, self.dp_size, self.is_data_leader = dp_rank, dp_size, is_data_leader
        self.rows: list[int] = []
        self.counted: list[int] = []

    def eval_step(self, batch: dict[str, torch.Tensor], loss: Any) -> EvalResult:
        self.rows.append(len(batch["index"]))
        return EvalResult(float(batch["index"].sum()), {"squares": float(batch["index"].square().sum())})

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
        count, squares = max(len(rank.counted), 1), sum(index * index for index in rank.counted)
        expected = {"validation_loss": sum(rank.counted) / count}
        if rank.counted:
            expected["validation_squares"] = squares / count
        assert metrics == pytest.approx(expected)
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


class PartedSource(Source):
    """Of 14 samples the first 8, the next 1 and the last 5 have a name; sample i stands for 10 (i + 1) bytes."""

    COUNTS = (8, 1, 5)

    def __init__(self) -> None:
        super().__init__(14)
        starts = (0, 8, 9, 14)
        self.num_bytes = 1050  # type: ignore[assignment]
        self.parts = [
            SourcePart(name, count, sum(10 * (i + 1) for i in range(start, start + count)))
            for name, count, start in zip("abc", self.COUNTS, starts, strict=False)
        ]


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (3, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("num_samples", [None, 7])
def test_parts_are_reported_each_and_all_together(batch_size: int, dp_size: int, num_samples: int | None) -> None:
    ranks = [Rank(rank, dp_size) for rank in range(dp_size)]
    source = PartedSource()
    sums: dict[str, float] = {}
    for rank in ranks:
        rank.likelihood = True  # type: ignore[attr-defined]
        metrics = evaluate(rank, rank, source, batch_size=batch_size, num_samples=num_samples)  # type: ignore[arg-type]
        assert metrics is not None
        # Alone, a rank reports its own samples: as sums they are added to those of the others.
        of_part = {"a": range(8), "b": range(8, 9), "c": range(9, 14)}
        for name, samples in [*of_part.items(), ("", range(14))]:
            prefix = f"validation/{name}/" if name else "validation_"
            count = sum(index in samples for index in rank.counted)
            assert (f"{prefix}bits_per_byte" in metrics) == (num_samples is None)
            assert metrics[f"{prefix}perplexity"] == pytest.approx(math.exp(metrics[f"{prefix}loss"]))
            sums[name] = sums.get(name, 0.0) + metrics[f"{prefix}loss"] * max(count, 1)
            if num_samples is None:
                num_bytes = 10 * sum(index + 1 for index in samples)
                expected = metrics[f"{prefix}loss"] * max(count, 1) / math.log(2) / num_bytes
                assert metrics[f"{prefix}bits_per_byte"] == pytest.approx(expected)
    assert all(rank.rows == ranks[0].rows for rank in ranks)
    evaluated = sorted(index for rank in ranks for index in rank.counted)
    # The same samples as without parts, whatever the layout: 7 of 14 are every second one.
    assert evaluated == list(range(0, 14, 1 if num_samples is None else 2))
    for name, samples in {"a": range(8), "b": range(8, 9), "c": range(9, 14), "": range(14)}.items():
        assert sums[name] == sum(index for index in evaluated if index in samples)


def test_a_part_without_samples_is_left_out() -> None:
    rank = Rank(0, 1)
    metrics = evaluate(rank, rank, PartedSource(), batch_size=2, num_samples=3)  # type: ignore[arg-type]
    assert rank.counted == [0, 4, 9]
    assert metrics is not None
    assert [name for name in metrics if name.endswith("/loss")] == ["validation/a/loss", "validation/c/loss"]


def test_unlimited_perplexity_is_infinite() -> None:
    rank = Rank(0, 1)
    rank.likelihood = True  # type: ignore[attr-defined]
    rank.eval_step = lambda batch, loss: EvalResult(1e6)  # type: ignore[method-assign]
    metrics = evaluate(rank, rank, Source(1), batch_size=1)  # type: ignore[arg-type]
    assert metrics == {"validation_loss": 1e6, "validation_perplexity": math.inf}
