"""The step loader: index arithmetic, resuming, ends, errors and its thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import TextDataConfig
from data_pipeline.loader import StepLoader, micro_batch_indices
from data_pipeline.store.manifest import Manifest
from data_pipeline.text_build import sequential_source


class CountingSource:
    """Row i holds the number i; fails on purpose at ``fail_at``."""

    fingerprint = "counting"
    num_bytes = None

    def __init__(self, num_samples: int | None = None, fail_at: int | None = None) -> None:
        self.num_samples, self.fail_at = num_samples, fail_at

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        if self.fail_at in indices:
            raise RuntimeError(f"row {self.fail_at} is broken")
        tokens = np.repeat(np.array(indices, dtype=np.int32)[:, None], 2, axis=1)
        zeros = np.zeros_like(tokens)
        return {"tokens": tokens, "loss_mask": np.ones(tokens.shape, dtype=bool), "seq_idx": zeros}

    def provenance(self, index: int) -> list[dict[str, object]]:
        return []

    def close(self) -> None: ...


@given(step=st.integers(0, 1000), micro=st.integers(1, 4), dp=st.integers(1, 5), accumulation=st.integers(1, 4))
def test_ranks_and_micro_batches_partition_the_global_batch(step: int, micro: int, dp: int, accumulation: int) -> None:
    global_batch = micro * dp * accumulation
    parts = [micro_batch_indices(step, global_batch, micro, rank, dp) for rank in range(dp)]
    assert all(len(part) == accumulation for part in parts)
    # Micro-batch by micro-batch over the ranks, the indices count up: the order is that of one rank alone.
    flat = [i for number in range(accumulation) for part in parts for i in part[number]]
    assert flat == list(range(step * global_batch, (step + 1) * global_batch))


def steps(source: object, layout: tuple[int, int, int, int], start: int, count: int) -> list[list]:
    with StepLoader(source, *layout, start_step=start) as loader:  # type: ignore[arg-type]
        return [next(loader) for _ in range(count)]


def test_steps_to_skip_are_left_out_unread_in_any_grouping(dataset: Path) -> None:
    skip = {0, 3, 4, 9}
    # Row 14 is one of step 3.
    with StepLoader(CountingSource(fail_at=14), 4, 2, 0, 1, skip=skip) as loader:  # type: ignore[arg-type]
        seen = [next(loader)[0]["sample_ids"][0] // 4 for _ in range(8)]
        assert seen == [1, 2, 5, 6, 7, 8, 10, 11]
        assert loader.state_dict()["samples"] == 12 * 4
    with StepLoader(CountingSource(num_samples=20), 4, 2, 0, 1, skip={2, 4, 5}) as loader:  # type: ignore[arg-type]
        assert [step[0]["sample_ids"][0] // 4 for step in loader] == [0, 1, 3]
    # Text is read several steps at once.
    config = TextDataConfig(path=str(dataset), sequence_length=24, num_lanes=3)
    every = steps(config.build(seed=2).train, (4, 2, 1, 2), 0, 40)
    with StepLoader(config.build(seed=2).train, 4, 2, 1, 2, skip=skip) as loader:
        for number in (number for number in range(40) if number not in skip):
            for mine, expected in zip(next(loader), every[number], strict=True):
                np.testing.assert_array_equal(mine["tokens"], expected["tokens"])
                np.testing.assert_array_equal(mine["sample_ids"], expected["sample_ids"])


def test_any_layout_and_any_restart_give_the_same_global_batches(dataset: Path) -> None:
    config = TextDataConfig(path=str(dataset), sequence_length=24, num_lanes=3)

    def tokens(micro: int, dp: int, start: int, count: int) -> np.ndarray:
        """[steps, global batch, S] as the ranks together read it."""
        ranks = [steps(config.build(seed=2).train, (8, micro, rank, dp), start, count) for rank in range(dp)]
        return np.array(
            [
                [row for m in range(8 // (micro * dp)) for rank in ranks for row in rank[t][m]["tokens"]]
                for t in range(count)
            ]
        )

    whole = tokens(8, 1, 0, 9)
    for micro, dp in ((1, 1), (2, 2), (1, 4), (1, 8)):
        np.testing.assert_array_equal(tokens(micro, dp, 0, 9), whole)
        np.testing.assert_array_equal(tokens(micro, dp, 4, 5), whole[4:])


def test_finite_source_ends_alike_on_every_rank_and_covers_each_row_once(dataset: Path) -> None:
    source = sequential_source(Manifest.load(dataset), 24)
    assert source.num_samples is not None
    assert source.num_samples % 8
    every = source.batch(range(source.num_samples))
    seen, targets, counts = [], 0, []
    for rank in range(2):
        with StepLoader(source, 8, 2, rank, 2) as loader:
            batches = [micro for step in loader for micro in step]
        counts.append(len(batches))
        for batch in batches:
            assert batch["tokens"].shape == (2, 24)
            padding = ~batch["loss_mask"].any(axis=1)
            assert (batch["seq_idx"][padding] == -1).all()
            seen += [row.tobytes() for row in batch["tokens"][~padding]]
            targets += int(batch["loss_mask"].sum())
    assert counts[0] == counts[1] == 2 * -(-source.num_samples // 8)
    assert sorted(seen) == sorted(row.tobytes() for row in every["tokens"])
    assert targets == int(every["loss_mask"].sum())


def test_error_reaches_the_consumer_at_its_step_and_stays() -> None:
    loader = StepLoader(CountingSource(fail_at=9), 4, 4, 0, 1)
    assert [next(loader)[0]["tokens"][0, 0] for _ in range(2)] == [0, 4]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="row 9 is broken"):
            next(loader)
    assert loader.state_dict()["samples"] == 8
    loader.close()


def test_close_joins_a_thread_that_waits_on_a_full_queue() -> None:
    loader = StepLoader(CountingSource(), 4, 2, 0, 1)
    next(loader)
    loader.close()
    assert "data-prefetch" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_state_counts_what_was_handed_out_not_what_was_prefetched() -> None:
    loader = StepLoader(CountingSource(), 4, 2, 1, 2, start_step=5)
    batches = next(loader)
    assert batches[0]["tokens"][:, 0].tolist() == [22, 23]
    state = loader.state_dict()
    assert (state["version"], state["samples"], state["fingerprint"]) == (1, 24, "counting")
    loader.close()


@pytest.mark.parametrize("layout", [(6, 4, 0, 1), (8, 2, 0, 3), (0, 1, 0, 1), (4, 2, 2, 2)])
def test_impossible_layouts_are_refused(layout: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="data-parallel"):
        StepLoader(CountingSource(), *layout)
