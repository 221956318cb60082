"""Phonebook: look a name up in a list (Waleffe et al., arXiv 2406.07887; after Jelassi et al., arXiv 2402.01032).

R = rows, E = entries, N = tokens of a name, D = digits of a number, X = worked examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.synthetic.draws import Draws, log2_permutations
from data_pipeline.synthetic.source import Rows

NEWLINE, COLON, QUESTION, ANNOUNCE = 0, 1, 2, 3
DIGITS, NAMES = 4, 14  # first token of either kind
LETTERS = 26


@dataclass(frozen=True)
class Phonebook:
    """A list of ``name:number`` lines, X questions answered from it, and one more question.

    In letters, ``>`` (only ``reversed``: the queried name, told before the list)::

        >kdwq
        abxz:4711
        kdwq:0815
        ?abxz:4711
        ?kdwq:0815

    Targets are the digits of the last number. A name is ``name_length`` letters, or with ``num_names`` a single token
    of so many. Names of a list differ, and so do the names asked for. A variant is the number of entries.
    """

    name_length: int
    num_names: int | None
    number_length: int
    num_examples: int
    reversed: bool

    @property
    def name_tokens(self) -> int:
        """Tokens of a name."""
        return self.name_length if self.num_names is None else 1

    @property
    def possible_names(self) -> int:
        """How many names there are."""
        return LETTERS**self.name_length if self.num_names is None else self.num_names

    @property
    def vocab_size(self) -> int:
        """Marks, digits, and letters or names."""
        return NAMES + (LETTERS if self.num_names is None else self.num_names)

    def describe(self) -> str:
        fields = (self.name_length, self.num_names, self.number_length, self.num_examples, self.reversed)
        return "phonebook " + " ".join(map(str, fields))

    def length(self, variant: int) -> int:
        names, digits = self.name_tokens, self.number_length
        announced = names + 2 if self.reversed else 0
        entries, examples = variant * (names + digits + 2), self.num_examples * (names + digits + 3)
        # Of the last line the input ends before the last digit.
        return announced + entries + examples + names + digits + 1

    def log2_rows(self, variant: int) -> float:
        numbers = variant * self.number_length * math.log2(10)
        return log2_permutations(self.possible_names, variant) + numbers + math.log2(variant)

    def draw(self, draws: Draws, variant: int) -> Rows:
        num_rows = len(draws.valid_R)
        names_REN = self._spelled(draws.distinct(self.possible_names, variant))
        numbers_RED = draws.below(10, variant * self.number_length).reshape(num_rows, variant, -1) + DIGITS
        asked_RX = draws.distinct(variant, self.num_examples + 1)
        rows = np.arange(num_rows)[:, None]

        def mark(token: int, count: int) -> np.ndarray:
            return np.full((num_rows, count, 1), token)

        entries = np.concatenate((names_REN, mark(COLON, variant), numbers_RED, mark(NEWLINE, variant)), axis=2)
        count = self.num_examples + 1
        asked = (names_REN[rows, asked_RX], mark(COLON, count), numbers_RED[rows, asked_RX], mark(NEWLINE, count))
        questions = np.concatenate((mark(QUESTION, count), *asked), axis=2)
        parts = [entries.reshape(num_rows, -1), questions.reshape(num_rows, -1)]
        if self.reversed:
            told = (mark(ANNOUNCE, 1), names_REN[rows, asked_RX[:, -1:]], mark(NEWLINE, 1))
            parts.insert(0, np.concatenate(told, axis=2).reshape(num_rows, -1))
        text = np.concatenate(parts, axis=1)[:, :-1]  # without the last newline
        tokens, targets = text[:, :-1], text[:, 1:]
        loss_mask = np.zeros(tokens.shape, bool)
        loss_mask[:, -self.number_length :] = True
        return Rows(tokens, targets, loss_mask)

    def text(self, tokens: np.ndarray) -> str:
        """Tokens as text, for people; single-token names as ``<number>``."""
        marks = {NEWLINE: "\n", COLON: ":", QUESTION: "?", ANNOUNCE: ">"}

        def shown(token: int) -> str:
            if token < DIGITS:
                return marks[token]
            if token < NAMES:
                return str(token - DIGITS)
            return chr(ord("a") + token - NAMES) if self.num_names is None else f"<{token - NAMES}>"

        return "".join(map(shown, np.asarray(tokens).tolist()))

    def _spelled(self, names_RE: np.ndarray) -> np.ndarray:
        """Tokens [R, E, N] of names by their number."""
        if self.num_names is not None:
            return names_RE[:, :, None] + NAMES
        powers_N = LETTERS ** np.arange(self.name_length - 1, -1, -1)
        return names_RE[:, :, None] // powers_N % LETTERS + NAMES
