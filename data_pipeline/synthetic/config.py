"""The ``data`` components of the synthetic tasks. Light at import.

Each has a list of difficulties for training, from which every row draws one, and one for validation (None: the same),
which is reported by difficulty.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from data_pipeline.source import DataSources
    from data_pipeline.synthetic.phonebook import Phonebook
    from data_pipeline.synthetic.source import Task

Violation = tuple[str, object, str, str]
_MOST_TOKENS = 1 << 31  # ids are int32
_MOST_POWER = 10  # weights stay within float64


@dataclass(frozen=True, kw_only=True)
class SyntheticFields(ABC):
    """What the tasks share. ``validation_samples``: rows of the validation split for each difficulty."""

    unit: ClassVar[str]
    variants_field: ClassVar[str]
    validation_field: ClassVar[str]
    more_rows: ClassVar[str]

    validation_samples: int = 256

    @abstractmethod
    def task(self) -> Task:
        """What makes the rows."""

    def variants(self) -> Sequence[int]:
        """Difficulties in training."""
        return tuple(getattr(self, self.variants_field))

    def validation_variants(self) -> Sequence[int]:
        """Difficulties in validation."""
        own = getattr(self, self.validation_field)
        return self.variants() if own is None else tuple(own)

    def build(self, seed: int) -> DataSources:
        """The two sources. Raises ValueError naming every broken rule."""
        from data_pipeline.source import DataSources
        from data_pipeline.synthetic.source import SyntheticSource

        faults = [f"{field} = {found!r}: {rule}; {fix}" for field, found, rule, fix in self.violations()]
        if faults:
            raise ValueError(f"{type(self).__name__} is invalid:\n  " + "\n  ".join(faults))
        task = self.task()
        train = SyntheticSource(task, self.variants(), self.unit, seed)
        validation = SyntheticSource(task, self.validation_variants(), self.unit, seed, self.validation_samples)
        # A task that cannot fill the split fails now, not at the first validation.
        for part in range(len(self.validation_variants())):
            validation.batch([part * self.validation_samples])
        return DataSources(train, validation, tokenizer_path=None)

    def violations(self) -> Iterator[Violation]:
        """Every broken rule as (field, found, rule, fix)."""
        broken = list(self.rules())
        yield from broken or self._too_few_rows()

    def rules(self) -> Iterator[Violation]:
        """Broken rules of single fields and their sizes, as (field, found, rule, fix)."""
        if self.validation_samples < 1:
            yield "validation_samples", self.validation_samples, "must be positive", "set 256, say"
        for name, variants in self._variant_fields():
            if not variants:
                yield name, variants, "must name at least one", f"set {name}: [8], say"
            elif len(set(variants)) != len(variants):
                yield name, list(variants), "names one twice", f"set {sorted(set(variants))}"

    def _too_few_rows(self) -> Iterator[Violation]:
        """Difficulties with hardly any different rows, of which none might be for validation."""
        from data_pipeline.synthetic.source import LEAST_ROWS

        task = self.task()
        for name, variants in self._variant_fields():
            wrong = [v for v in variants if task.log2_rows(v) < math.log2(LEAST_ROWS)]
            if wrong:
                rule = f"give fewer than {LEAST_ROWS} different rows, too few for training and validation"
                yield name, wrong, rule, self.more_rows

    def _variant_fields(self) -> Iterator[tuple[str, Sequence[int]]]:
        yield self.variants_field, self.variants()
        if getattr(self, self.validation_field) is not None:
            yield self.validation_field, self.validation_variants()

    def _outside(self, least: int, most: int | None, rule: str, fix: str) -> Iterator[Violation]:
        """Difficulties outside [least, most], by field."""
        for name, variants in self._variant_fields():
            wrong = [v for v in variants if v < least or (most is not None and v > most)]
            if wrong:
                yield name, wrong, rule, fix


@dataclass(frozen=True, kw_only=True)
class AssociativeRecallConfig(SyntheticFields):
    """Multi-query associative recall (Zoology, arXiv 2312.04927).

    Attributes:
        vocab_size: the lower half without 0 are keys, the upper half values.
        sequence_length: positions in a row; even.
        num_pairs, validation_pairs: key-value pairs in a row.
        power: of the power law of the distances at which keys are asked for; 1 for equally likely ones.
        random_filler: other positions hold random tokens (which may be keys), not 0.
    """

    unit: ClassVar[str] = "pairs"
    variants_field: ClassVar[str] = "num_pairs"
    validation_field: ClassVar[str] = "validation_pairs"
    more_rows: ClassVar[str] = "raise vocab_size, or sequence_length"

    vocab_size: int = 8192
    sequence_length: int = 64
    num_pairs: tuple[int, ...] = (8,)
    validation_pairs: tuple[int, ...] | None = None
    power: float = 0.01
    random_filler: bool = False

    def task(self) -> Task:
        from data_pipeline.synthetic.tasks import AssociativeRecall

        return AssociativeRecall(self.vocab_size, self.sequence_length, self.power, self.random_filler)

    def rules(self) -> Iterator[Violation]:
        from data_pipeline.synthetic.draws import most_distinct

        yield from super().rules()
        largest = max([1, *self.variants(), *self.validation_variants()])
        if not 4 <= self.vocab_size <= _MOST_TOKENS:
            fix = "set 8192, or 64 for small models"
            yield "vocab_size", self.vocab_size, f"must be from 4 to {_MOST_TOKENS}", fix
        else:
            keys = self.vocab_size // 2 - 1
            most = most_distinct(keys, draws=2)  # keys, and as many values
            rule = f"must be from 1 to the {keys} keys of a vocabulary of {self.vocab_size}"
            fix = f"lower it, or set vocab_size to {2 * largest + 2} or more"
            if most < keys:
                rule = f"must be from 1 to {most}: a vocabulary of {self.vocab_size} is so large that tokens are drawn"
                rule += " one by one, and more would hardly ever be different"
                fix = "lower it, or set vocab_size: 16384"
            yield from self._outside(1, most, rule, fix)
        if self.sequence_length % 2 or self.sequence_length < 4:
            even = max(4, self.sequence_length + 1)
            yield "sequence_length", self.sequence_length, "must be even and at least 4", f"set {even}"
        else:
            most = self.sequence_length // 4
            rule = f"need 4 positions each (key, value, key again, answer), of {self.sequence_length} there are"
            fix = f"at most {most} pairs, or sequence_length {4 * largest} or more"
            yield from self._outside(0, most, rule, fix)
        if not 0 < self.power <= _MOST_POWER:
            fix = "set 0.01 (most keys are asked for soon) or 1 (evenly)"
            yield "power", self.power, f"must be a number above 0, at most {_MOST_POWER}", fix


@dataclass(frozen=True, kw_only=True)
class InductionConfig(SyntheticFields):
    """Induction heads (arXiv 2312.00752, section 4.1.2): what followed the special token the first time?

    Attributes:
        vocab_size: with the special token.
        lengths, validation_lengths: positions in a row.
    """

    unit: ClassVar[str] = "tokens"
    variants_field: ClassVar[str] = "lengths"
    validation_field: ClassVar[str] = "validation_lengths"
    more_rows: ClassVar[str] = "raise vocab_size, or the lengths"

    vocab_size: int = 16
    lengths: tuple[int, ...] = (256,)
    validation_lengths: tuple[int, ...] | None = None

    @property
    def sequence_length(self) -> int:
        """The longest row of training."""
        return max(self.lengths, default=0)

    def task(self) -> Task:
        from data_pipeline.synthetic.tasks import Induction

        return Induction(self.vocab_size)

    def rules(self) -> Iterator[Violation]:
        yield from super().rules()
        if not 3 <= self.vocab_size <= _MOST_TOKENS:
            rule = f"must be from 3 (the special token and two others) to {_MOST_TOKENS}"
            yield "vocab_size", self.vocab_size, rule, "set 16"
        rule = "must be at least 16: special token, what follows, others, special token"
        yield from self._outside(16, None, rule, "set 256, say")


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig(SyntheticFields):
    """Selective copying (arXiv 2312.00752, section 4.1.1): repeat the data tokens that lay scattered in noise.

    Attributes:
        vocab_size: with noise and marker.
        num_data_tokens: tokens to copy.
        lengths, validation_lengths: positions before the markers.
    """

    unit: ClassVar[str] = "tokens"
    variants_field: ClassVar[str] = "lengths"
    validation_field: ClassVar[str] = "validation_lengths"
    more_rows: ClassVar[str] = "raise vocab_size, num_data_tokens or the lengths"

    vocab_size: int = 16
    num_data_tokens: int = 16
    lengths: tuple[int, ...] = (4096,)
    validation_lengths: tuple[int, ...] | None = None

    @property
    def sequence_length(self) -> int:
        """The longest row of training, markers included."""
        return max(self.lengths, default=0) + self.num_data_tokens

    def task(self) -> Task:
        from data_pipeline.synthetic.tasks import SelectiveCopying

        return SelectiveCopying(self.vocab_size, self.num_data_tokens)

    def rules(self) -> Iterator[Violation]:
        yield from super().rules()
        if not 4 <= self.vocab_size <= _MOST_TOKENS:
            rule = f"must be from 4 (noise, marker and two data tokens) to {_MOST_TOKENS}"
            yield "vocab_size", self.vocab_size, rule, "set 16"
        if self.num_data_tokens < 4:
            yield "num_data_tokens", self.num_data_tokens, "must be at least 4", "set 16"
        rule = f"must hold the {self.num_data_tokens} data tokens"
        yield from self._outside(max(1, self.num_data_tokens), None, rule, f"set {4 * self.num_data_tokens} or more")


@dataclass(frozen=True, kw_only=True)
class PhonebookConfig(SyntheticFields):
    """Phonebook (arXiv 2406.07887): a name's number from a list, after worked examples.

    Attributes:
        num_entries, validation_entries: entries in the list.
        name_length: letters of a name; read when ``num_names`` is None.
        num_names: every name is one token of so many; None for names spelt in letters.
        number_length: digits of a number.
        num_examples: questions that are answered before the one that counts.
        reversed: the name is told before the list, too.
    """

    unit: ClassVar[str] = "entries"
    variants_field: ClassVar[str] = "num_entries"
    validation_field: ClassVar[str] = "validation_entries"
    more_rows: ClassVar[str] = "raise number_length, or use longer names or more entries"

    num_entries: tuple[int, ...] = (8, 16, 32, 64)
    validation_entries: tuple[int, ...] | None = None
    name_length: int = 4
    num_names: int | None = None
    number_length: int = 4
    num_examples: int = 2
    reversed: bool = False

    @property
    def sequence_length(self) -> int:
        """The longest row of training."""
        return max((self.task().length(variant) for variant in self.num_entries), default=0)

    @property
    def vocab_size(self) -> int:
        """Marks, digits, and letters or names."""
        return self.task().vocab_size

    def task(self) -> Phonebook:
        from data_pipeline.synthetic.phonebook import Phonebook

        return Phonebook(self.name_length, self.num_names, self.number_length, self.num_examples, self.reversed)

    def rules(self) -> Iterator[Violation]:
        from data_pipeline.synthetic.draws import most_distinct
        from data_pipeline.synthetic.phonebook import NAMES

        yield from super().rules()
        broken = False
        limits = {"name_length": 6, "number_length": 64}
        for name, limit in limits.items():
            value: Any = getattr(self, name)
            if not 1 <= value <= limit:
                broken = True
                yield name, value, f"must be from 1 to {limit}", "set 4"
        largest = _MOST_TOKENS - NAMES
        if self.num_names is not None and not 1 <= self.num_names <= largest:
            broken = True
            fix = "set 1000, or null for names spelt in letters"
            yield "num_names", self.num_names, f"must be from 1 to {largest}", fix
        if self.num_examples < 0:
            yield "num_examples", self.num_examples, "must not be negative", "set 2"
            return
        rule = f"must hold the {self.num_examples + 1} different names that are asked for"
        yield from self._outside(self.num_examples + 1, None, rule, f"set {self.num_examples + 1} entries or more")
        if not broken:
            names = self.task().possible_names
            fix = "use fewer entries, or longer names (name_length)" if self.num_names is None else "raise num_names"
            rule = f"are too many for different names: there are {names:,} names, good for {most_distinct(names):,}"
            yield from self._outside(0, most_distinct(names), rule, fix)
