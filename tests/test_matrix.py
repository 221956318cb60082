"""The choice of cases from a matrix: small, complete in pairs, the same for the same commit."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from support.matrix import pairwise, rotating

CASES = [case for case in product("abcd", (1, 2, 4), (False, True), "xyz") if not (case[0] == "a" and case[2])]


def pairs(cases: list[tuple[object, ...]]) -> set[tuple[object, ...]]:
    return {(i, c[i], j, c[j]) for c in cases for i, j in combinations(range(len(c)), 2)}


def test_every_pair_meets_in_few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_FULL_MATRIX", raising=False)
    chosen = pairwise(CASES, [("b", 2, True, "x")])
    assert ("b", 2, True, "x") in chosen
    assert pairs(chosen) == pairs(CASES)
    assert len(chosen) <= 20 < len(CASES) == len(set(CASES))
    assert [case for case in CASES if case in chosen] == chosen


def test_the_choice_follows_the_commit_and_the_command_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_FULL_MATRIX", raising=False)
    choices = []
    for seed in ("one", "two", "one"):
        monkeypatch.setenv("PRETRAIN_MATRIX_SEED", seed)
        choices.append(pairwise(CASES))
    assert choices[0] == choices[2] != choices[1]
    monkeypatch.setenv("PRETRAIN_FULL_MATRIX", "1")
    assert pairwise(CASES) == CASES


def test_each_case_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRAIN_FULL_MATRIX", raising=False)
    cases, seen = [("a",), ("b",), ("c",), ("d",)], set()
    for seed in range(40):
        monkeypatch.setenv("PRETRAIN_MATRIX_SEED", str(seed))
        chosen = rotating(cases, 2, always=[("b",)])
        assert len(chosen) == 2
        assert ("b",) in chosen
        seen |= set(chosen)
    assert seen == set(cases)
    monkeypatch.setenv("PRETRAIN_FULL_MATRIX", "1")
    assert rotating(cases, 2) == cases
