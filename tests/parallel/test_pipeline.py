"""The cut of a layer stack, against every possible cut."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.parallel.pipeline import balanced_split, explicit_split, pipeline_stages, stage_cost, stages
from pretrain.parallel.stage import Stage


def all_splits(num_layers: int, num_chunks: int) -> list[list[int]]:
    cuts = combinations(range(1, num_layers), num_chunks - 1)
    return [[b - a for a, b in zip((0, *cut), (*cut, num_layers), strict=True)] for cut in cuts]


def chunk_costs(split: list[int], costs: list[int], first: int, last: int) -> list[int]:
    bounds = [sum(split[:i]) for i in range(len(split) + 1)]
    result = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    result[0] += first
    result[-1] += last
    return result


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    costs = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    return costs, draw(st.integers(1, len(costs))), draw(st.integers(0, 12)), draw(st.integers(0, 12))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_split_is_better_and_ties_go_by_the_stated_rule(problem: tuple[list[int], int, int, int]) -> None:
    costs, num_chunks, first, last = problem

    def rank(split: list[int]) -> tuple[int, int, list[int]]:
        chunks = chunk_costs(split, costs, first, last)
        return max(chunks), sum(chunk**2 for chunk in chunks), split

    assert balanced_split(costs, num_chunks, first, last) == min(all_splits(len(costs), num_chunks), key=rank)


def test_equal_layers_make_even_chunks_and_a_dear_head_takes_its_share() -> None:
    assert balanced_split([1.0] * 9, 4) == [2, 2, 2, 3]
    assert balanced_split([1.0] * 8, 2, last_extra=4.0) == [6, 2]
    assert balanced_split([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2) == [1, 5]


def test_a_deep_model_is_cut_quickly_enough_to_be_part_of_every_check() -> None:
    split = balanced_split([float(3 + i % 5) for i in range(200)], 32, 10.0, 40.0)
    assert (len(split), sum(split), min(split) >= 1) == (32, 200, True)


@pytest.mark.parametrize("num_chunks", [0, 4])
def test_impossible_numbers_of_chunks_are_refused(num_chunks: int) -> None:
    with pytest.raises(ValueError, match="take 1 to 3 chunks"):
        balanced_split([1, 1, 1], num_chunks)


@pytest.mark.parametrize("split", [[2, 2], [1, 3, 2], [0, 4, 1], [3, 3, -1]])
def test_explicit_splits_must_fit(split: list[int]) -> None:
    assert explicit_split([1, 2, 2], 5, 3) == [1, 2, 2]
    with pytest.raises(ValueError, match="expected 3 positive numbers of layers that add up to 5"):
        explicit_split(split, 5, 3)


def test_stages_are_whole_and_in_order() -> None:
    assert stages([2, 1, 3]) == [
        Stage(0, 2, has_embedding=True, has_head=False),
        Stage(2, 3, has_embedding=False, has_head=False),
        Stage(3, 6, has_embedding=False, has_head=True),
    ]
    assert stages([4]) == [Stage.whole(4)]


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 3))
def test_chunks_of_ranks_interleave_and_cover_the_model(problem: tuple[list[int], int, int, int], virtual: int) -> None:
    costs, parallel, first, last = problem
    if parallel * virtual > len(costs):
        return
    ranks = pipeline_stages(len(costs), costs, (first, last), parallel, virtual)
    assert [len(chunks) for chunks in ranks] == [virtual] * parallel
    in_order = [ranks[i % parallel][i // parallel] for i in range(parallel * virtual)]
    split = balanced_split(costs, parallel * virtual, first, last)
    assert in_order == stages(split)
    assert [layer for stage in in_order for layer in range(stage.first, stage.stop)] == list(range(len(costs)))
    assert [stage_cost(stage, costs, (first, last)) for stage in in_order] == chunk_costs(split, costs, first, last)


def test_an_explicit_cut_replaces_the_balanced_one() -> None:
    ranks = pipeline_stages(6, [1.0] * 6, (0.0, 9.0), 2, 2, [1, 2, 2, 1])
    assert [[(stage.first, stage.stop) for stage in chunks] for chunks in ranks] == [[(0, 1), (3, 5)], [(1, 3), (5, 6)]]


def test_cutting_needs_no_torch() -> None:
    code = "import sys, pretrain.parallel.pipeline; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
