"""Rows of the synthetic tasks against what their papers say a row is."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from data_pipeline.synthetic.config import (
    AssociativeRecallConfig,
    InductionConfig,
    PhonebookConfig,
    SelectiveCopyingConfig,
    SyntheticFields,
)
from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.source import Rows, Task

RECALL = AssociativeRecallConfig(vocab_size=64, sequence_length=64, num_pairs=(4, 16), validation_samples=20)
INDUCTION = InductionConfig(vocab_size=16, lengths=(32, 64), validation_lengths=(32, 128), validation_samples=20)
COPYING = SelectiveCopyingConfig(vocab_size=16, num_data_tokens=16, lengths=(40, 64), validation_samples=20)
PHONEBOOK = PhonebookConfig(num_entries=(3, 9), validation_samples=20)
ALL = [
    RECALL,
    AssociativeRecallConfig(vocab_size=33, sequence_length=32, num_pairs=(8,), random_filler=True),
    INDUCTION,
    COPYING,
    PHONEBOOK,
    PhonebookConfig(num_entries=(5,), reversed=True, num_examples=0, number_length=7),
    PhonebookConfig(num_entries=(5, 40), num_names=300, number_length=1),
    AssociativeRecallConfig(vocab_size=65536, sequence_length=1020, num_pairs=(255,), validation_samples=40),
]


@pytest.mark.parametrize("random_filler", [False, True])
def test_associative_recall(random_filler: bool) -> None:
    config = AssociativeRecallConfig(vocab_size=64, num_pairs=(4, 16), random_filler=random_filler)
    batch = config.build(0).train.batch(range(200))
    found: Counter[int] = Counter()
    for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True):
        num_pairs = int(mask.sum())
        found[num_pairs] += 1
        keys, values = tokens[0 : 2 * num_pairs : 2].tolist(), tokens[1 : 2 * num_pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert set(keys) <= set(range(1, 32))
        assert set(values) <= set(range(32, 64))
        places = np.flatnonzero(mask)
        assert (places >= 2 * num_pairs).all()
        assert (places % 2 == 0).all()
        assert dict(zip(tokens[places].tolist(), targets[places].tolist(), strict=True)) == dict(
            zip(keys, values, strict=True)
        )
        rest = np.delete(tokens, np.concatenate((np.arange(2 * num_pairs), places)))
        assert (rest == 0).all() != random_filler
    assert set(found) == {4, 16}
    assert min(found.values()) > 70


def test_distances_follow_the_power_law() -> None:
    # One pair: the gap is a single draw with weight (g + 1)^(power - 1), as in Zoology's multiquery_ar.
    config = AssociativeRecallConfig(vocab_size=64, sequence_length=16, num_pairs=(1,), power=0.01)
    mask = config.build(1).train.batch(range(20_000))["loss_mask"]
    gaps = (np.argmax(mask, axis=1) - 2) // 2
    expected = np.arange(1.0, 8.0) ** -0.99
    found = np.bincount(gaps, minlength=7) / len(gaps)
    assert found == pytest.approx(expected / expected.sum(), abs=0.015)  # 4 standard deviations


def test_induction() -> None:
    batch = INDUCTION.build(0).train.batch(range(300))
    lengths: Counter[int] = Counter()
    places = []
    for row, tokens in enumerate(batch["tokens"]):
        length = int((batch["seq_idx"][row] == 0).sum())
        lengths[length] += 1
        assert batch["loss_mask"][row].nonzero()[0].tolist() == [length - 1]
        first, last = (tokens[:length] == 0).nonzero()[0].tolist()
        assert last == length - 1
        assert batch["targets"][row, last] == tokens[first + 1] != 0
        places.append(first / (length - 3))
    assert set(lengths) == {32, 64}
    assert np.mean(places) == pytest.approx(0.5, abs=0.07)


def test_selective_copying() -> None:
    batch = COPYING.build(0).train.batch(range(100))
    spread = np.zeros(40)
    for row, tokens in enumerate(batch["tokens"]):
        length = int((batch["seq_idx"][row] == 0).sum()) - 16
        data = tokens[:length][tokens[:length] != 0]
        assert len(data) == 16
        assert set(data.tolist()) <= set(range(1, 15))
        assert tokens[length : length + 16].tolist() == [15] * 16
        assert batch["targets"][row, length : length + 16].tolist() == data.tolist()
        assert batch["loss_mask"][row].nonzero()[0].tolist() == list(range(length, length + 16))
        if length == 40:
            spread += tokens[:40] != 0
    assert (spread > 0).all()


@pytest.mark.parametrize("reversed_order", [False, True])
@pytest.mark.parametrize("num_names", [None, 1000])
def test_phonebook(reversed_order: bool, num_names: int | None) -> None:
    config = PhonebookConfig(num_entries=(3, 9), reversed=reversed_order, num_names=num_names)
    task = config.task()
    batch = config.build(0).train.batch(range(60))
    name = "[a-z]{4}" if num_names is None else r"<\d+>"
    line = rf"{name}:\d{{4}}\n"
    pattern = re.compile(
        rf"(?:>(?P<told>{name})\n)?(?P<list>(?:{line})+)(?P<examples>(?:\?{line}){{2}})\?(?P<asked>{name}):(?P<rest>\d{{3}})"
    )
    counts = set()
    for row, tokens in enumerate(batch["tokens"]):
        used = batch["seq_idx"][row] == 0
        match = pattern.fullmatch(task.text(tokens[used]))
        assert match is not None
        entries = dict(line.split(":") for line in match["list"].splitlines())
        answer = task.text(batch["targets"][row][batch["loss_mask"][row]])
        assert answer == entries[match["asked"]]
        assert answer[:3] == match["rest"]
        examples = dict(line[1:].split(":") for line in match["examples"].splitlines())
        assert len(examples) == 2
        assert examples.items() <= entries.items()
        assert match["asked"] not in examples
        assert match["told"] == (match["asked"] if reversed_order else None)
        counts.add(len(entries))
    assert counts == {3, 9}
    assert batch["tokens"].shape[1] == config.sequence_length


@pytest.mark.parametrize("config", ALL)
def test_rows_depend_on_seed_split_and_index_alone(config: SyntheticFields) -> None:
    sources = config.build(5)
    together = sources.train.batch(range(1000, 1050))
    apart = [sources.train.batch([index]) for index in (1049, 1000)]
    for name, array in together.items():
        assert np.array_equal(apart[0][name][0], array[49])
        assert np.array_equal(apart[1][name][0], array[0])
    other = config.build(6).train
    assert other.fingerprint != sources.train.fingerprint
    assert config.build(5).train.fingerprint == sources.train.fingerprint
    assert not np.array_equal(other.batch(range(1000, 1050))["tokens"], together["tokens"])
    assert len(np.unique(together["tokens"], axis=0)) == 50


@pytest.mark.parametrize("config", ALL)
def test_arrays_are_as_the_objective_wants_them(config: SyntheticFields) -> None:
    batch = config.build(0).train.batch(range(40))
    for name in ("tokens", "targets", "seq_idx", "position_ids"):
        assert batch[name].dtype == np.int32
    used = batch["seq_idx"] == 0
    assert (batch["seq_idx"][~used] == -1).all()
    assert not batch["loss_mask"][~used].any()
    lengths = used.sum(axis=1)
    assert lengths.max() == batch["tokens"].shape[1] == config.sequence_length  # type: ignore[attr-defined]
    for row, length in enumerate(lengths):
        assert batch["position_ids"][row].tolist() == [*range(length), *[0] * (len(used[row]) - length)]
    assert batch["tokens"].min() >= 0
    assert max(batch["tokens"].max(), batch["targets"].max()) < config.vocab_size  # type: ignore[attr-defined]


def test_no_row_of_any_seed_is_in_both_splits() -> None:
    # So few different rows (31 x 32, over 7 places) that splits which are only drawn apart would share most of them.
    config = AssociativeRecallConfig(vocab_size=64, sequence_length=16, num_pairs=(1,), validation_samples=2000)

    def rows(source: object, count: int) -> set[bytes]:
        return {row.tobytes() for row in source.batch(range(count))["tokens"]}  # type: ignore[attr-defined]

    validation = rows(config.build(0).validation, 2000)
    training = rows(config.build(0).train, 20_000) | rows(config.build(1).train, 20_000)
    assert len(validation) > 500
    assert len(training) > 5000
    assert not validation & training
    # Both splits are of the same kind: one row in eight is for validation, whatever its tokens are.
    assert np.mean([draw["draws"] for n in range(300) for draw in config.build(0).train.provenance(n)]) < 1.3


def test_validation_is_finite_and_in_parts_of_one_length() -> None:
    validation = INDUCTION.build(0).validation
    assert validation is not None
    assert validation.num_samples == 40
    assert [(part.name, part.num_samples) for part in validation.parts] == [("32_tokens", 20), ("128_tokens", 20)]  # type: ignore[attr-defined]
    assert validation.batch(range(20))["tokens"].shape == (20, 32)
    assert validation.batch(range(20, 40))["tokens"].shape == (20, 128)
    with pytest.raises(IndexError, match="sample 40 is outside the 40 samples"):
        validation.batch([39, 40])


class OneRow:
    """A task with a single row, which violations cannot know: it says to have many."""

    def describe(self) -> str:
        return "one row"

    def length(self, variant: int) -> int:
        return 4

    def log2_rows(self, variant: int) -> float:
        return 60.0

    def draw(self, draws: Draws, variant: int) -> Rows:
        shape = (len(draws.valid_R), 4)
        return Rows(np.ones(shape, np.int64), np.ones(shape, np.int64), np.ones(shape, bool))


def test_a_split_that_cannot_be_filled_fails_before_a_run() -> None:
    class Config(InductionConfig):
        def task(self) -> Task:
            return OneRow()

    with pytest.raises(ValueError, match="no row for the validation split in 1000 draws"):
        Config().build(0)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (AssociativeRecallConfig(vocab_size=8, sequence_length=8, num_pairs=(2,)), 6 * 12 * 2),
        (SelectiveCopyingConfig(vocab_size=4, num_data_tokens=4, lengths=(5,)), 16 * 5),
        (PhonebookConfig(num_names=2, num_entries=(2,), number_length=1, num_examples=0), 400),
    ],
)
def test_rows_are_counted(config: SyntheticFields, rows: int) -> None:
    task = config.task()
    variant = config.variants()[0]
    drawn = task.draw(Draws(0, np.arange(40 * rows)), variant).tokens
    assert len(np.unique(drawn, axis=0)) == rows  # each is missed with a probability of e^-40 if equally likely
    assert 2 ** task.log2_rows(variant) == pytest.approx(rows)
    broken = [(field, rule) for field, _, rule, _ in config.violations()]
    assert bool(broken) == (rows < 256)
    if broken:
        assert broken[0][0] == config.variants_field
        assert "fewer than 256 different rows" in broken[0][1]


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (AssociativeRecallConfig(vocab_size=16, sequence_length=128, num_pairs=(4, 8)), ["num_pairs"]),
        (AssociativeRecallConfig(sequence_length=31, power=0.0), ["sequence_length", "power"]),
        (AssociativeRecallConfig(num_pairs=()), ["num_pairs"]),
        (AssociativeRecallConfig(sequence_length=32, num_pairs=(4,), validation_pairs=(9,)), ["validation_pairs"]),
        (AssociativeRecallConfig(num_pairs=(0,), vocab_size=2), ["vocab_size"]),
        (InductionConfig(lengths=(8,), vocab_size=2), ["vocab_size", "lengths"]),
        (SelectiveCopyingConfig(lengths=(15, 64), vocab_size=3), ["vocab_size", "lengths"]),
        (PhonebookConfig(num_entries=(2, 8)), ["num_entries"]),
        (PhonebookConfig(num_entries=(30,), name_length=1), ["num_entries"]),
        (PhonebookConfig(num_entries=(8, 8), name_length=0), ["num_entries", "name_length"]),
        (PhonebookConfig(number_length=0, num_names=0), ["number_length", "num_names"]),
        (AssociativeRecallConfig(vocab_size=4, sequence_length=4, num_pairs=(1,)), ["num_pairs"]),
        (AssociativeRecallConfig(vocab_size=65536, sequence_length=2048, num_pairs=(300,)), ["num_pairs"]),
        (AssociativeRecallConfig(power=float("inf"), vocab_size=10**10), ["vocab_size", "power"]),
        (AssociativeRecallConfig(power=float("nan")), ["power"]),
        (InductionConfig(vocab_size=10**10), ["vocab_size"]),
        (SelectiveCopyingConfig(vocab_size=4, num_data_tokens=4, lengths=(4, 64)), ["lengths"]),
        (PhonebookConfig(num_names=10**10), ["num_names"]),
        (PhonebookConfig(num_names=1, num_entries=(1,), number_length=1, num_examples=0), ["num_entries"]),
        (PhonebookConfig(num_examples=-1, validation_samples=0), ["validation_samples", "num_examples"]),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_with_the_fix(config: SyntheticFields, fields: list[str]) -> None:
    violations = list(config.violations())
    assert [field for field, *_ in violations] == fields
    assert all(fix for *_, fix in violations)
    with pytest.raises(ValueError, match=fields[0]):
        config.build(0)
