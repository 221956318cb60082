"""The random numbers behind the synthetic tasks, against published values and the distributions they claim."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.synthetic.draws import Draws, most_distinct, sequence


def test_splitmix64_gives_the_published_numbers() -> None:
    # Seed 1234567, the test vector of Rosetta Code ("Pseudo-random numbers/Splitmix64").
    found = sequence(np.array([1234567], dtype=np.uint64), 0, 5)[0].tolist()
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert sequence(np.array([1234567], dtype=np.uint64), 3, 2)[0].tolist() == found[3:]


def test_numbers_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    together, alone = Draws(9, np.arange(50)), Draws(9, np.array([31]))
    for draws in (together.words, alone.words), (lambda n: together.below(7, n), lambda n: alone.below(7, n)):
        assert np.array_equal(draws[0](20)[31], draws[1](20)[0])
    assert not np.array_equal(Draws(9, np.arange(50)).words(3), Draws(8, np.arange(50)).words(3))
    assert not np.array_equal(Draws(9, np.arange(50)).words(3), Draws(9, np.arange(50), attempt=1).words(3))


def test_integers_below_a_limit_are_equally_likely() -> None:
    counts = np.bincount(Draws(1, np.arange(1000)).below(6, 60).ravel(), minlength=6)
    # Chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 20.5


def test_distinct_integers() -> None:
    shuffled = Draws(2, np.arange(2000)).distinct(5, 5)
    assert (np.sort(shuffled, axis=1) == np.arange(5)).all()
    assert np.bincount(shuffled[:, 0], minlength=5) == pytest.approx(400, abs=80)
    # Too many to shuffle: rows that are not different are told.
    draws = Draws(2, np.arange(400))
    numbers = draws.distinct(10_000, 100)
    different = np.array([len(set(row)) == 100 for row in numbers.tolist()])
    assert np.array_equal(draws.valid_R, different)
    assert 0.5 < different.mean() < 0.7  # exp(-100^2 / 2 / 10,000) = 0.61
    assert most_distinct(8192) == 8192
    assert most_distinct(10_000) == 200


def test_weighted_draws_are_those_of_numpy() -> None:
    weights = np.array([5.0, 1.0, 3.0, 1.0])
    found = Draws(3, np.arange(20_000)).distinct_weighted(weights, 2)
    generator = np.random.default_rng(0)
    expected = np.array([generator.choice(4, size=2, replace=False, p=weights / 10) for _ in range(20_000)])
    pairs = [np.bincount(pair[:, 0] * 4 + pair[:, 1], minlength=16) / 20_000 for pair in (found, expected)]
    assert pairs[0] == pytest.approx(pairs[1], abs=0.015)
    assert (found[:, 0] != found[:, 1]).all()
