"""Associative recall, induction and selective copying: rows of tokens with targets at few positions.

R = rows, S = positions in a row, K = key-value pairs, M = tokens to copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.synthetic.draws import Draws, log2_permutations
from data_pipeline.synthetic.source import Rows


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (Arora et al., Zoology, arXiv 2312.04927, section 3 and appendix).

    ``k1 v1 ... kK vK`` and then every key once more; the target at a repeated key is its value. Keys are different
    tokens of the lower half of the vocabulary without 0, values different ones of the upper half. The repeated key with
    gap g is 2 g positions after the pairs; gaps are drawn without replacement with weights (g + 1)^(power - 1). Other
    positions hold 0, or any token with ``random_filler``. A variant is the number K.
    """

    vocab_size: int
    sequence_length: int
    power: float
    random_filler: bool

    def describe(self) -> str:
        return f"associative recall {self.vocab_size} {self.sequence_length} {self.power!r} {self.random_filler}"

    def length(self, variant: int) -> int:
        return self.sequence_length

    def log2_rows(self, variant: int) -> float:
        half = self.vocab_size // 2
        limits = (half - 1, self.vocab_size - half, self.sequence_length // 2 - variant)  # keys, values, places
        return sum(log2_permutations(limit, variant) for limit in limits)

    def draw(self, draws: Draws, variant: int) -> Rows:
        num_rows, num_pairs, half = len(draws.valid_R), variant, self.vocab_size // 2
        keys_RK = draws.distinct(half - 1, num_pairs) + 1
        values_RK = draws.distinct(self.vocab_size - half, num_pairs) + half
        spaces = (self.sequence_length - 2 * num_pairs) // 2
        weights = np.arange(1, spaces + 1, dtype=np.float64) ** (self.power - 1)
        places_RK = 2 * num_pairs + 2 * draws.distinct_weighted(weights, num_pairs)
        shape = (num_rows, self.sequence_length)
        tokens = draws.below(self.vocab_size, self.sequence_length) if self.random_filler else np.zeros(shape, np.int64)
        tokens[:, 0 : 2 * num_pairs : 2] = keys_RK
        tokens[:, 1 : 2 * num_pairs : 2] = values_RK
        np.put_along_axis(tokens, places_RK, keys_RK, axis=1)
        targets = np.zeros(shape, np.int64)
        np.put_along_axis(targets, places_RK, values_RK, axis=1)
        loss_mask = np.zeros(shape, bool)
        np.put_along_axis(loss_mask, places_RK, True, axis=1)
        return Rows(tokens, targets, loss_mask)


@dataclass(frozen=True)
class Induction:
    """Induction heads (Olsson et al., arXiv 2209.11895; as a task: Gu & Dao, arXiv 2312.00752, section 4.1.2).

    Random tokens, among them once the special token 0; at the last position it comes again, and the target there is the
    token that followed it the first time. A variant is the length.
    """

    vocab_size: int

    def describe(self) -> str:
        return f"induction {self.vocab_size}"

    def length(self, variant: int) -> int:
        return variant

    def log2_rows(self, variant: int) -> float:
        return (variant - 2) * math.log2(self.vocab_size - 1)

    def draw(self, draws: Draws, variant: int) -> Rows:
        rows = np.arange(len(draws.valid_R))
        tokens = draws.below(self.vocab_size - 1, variant) + 1
        place_R = draws.below(variant - 2, 1)[:, 0]
        tokens[rows, place_R] = 0
        tokens[:, -1] = 0
        targets = np.zeros_like(tokens)
        targets[:, -1] = tokens[rows, place_R + 1]
        loss_mask = np.zeros(tokens.shape, bool)
        loss_mask[:, -1] = True
        return Rows(tokens, targets, loss_mask)


@dataclass(frozen=True)
class SelectiveCopying:
    """Selective copying (Gu & Dao, arXiv 2312.00752, section 4.1.1).

    M data tokens (1 .. vocabulary - 2) at random places among noise (0), then M markers (vocabulary - 1), at which the
    targets are the data tokens in their order. A variant is the number of positions before the markers.
    """

    vocab_size: int
    num_data_tokens: int

    def describe(self) -> str:
        return f"selective copying {self.vocab_size} {self.num_data_tokens}"

    def length(self, variant: int) -> int:
        return variant + self.num_data_tokens

    def log2_rows(self, variant: int) -> float:
        places = log2_permutations(variant, self.num_data_tokens) - math.lgamma(self.num_data_tokens + 1) / math.log(2)
        return places + self.num_data_tokens * math.log2(self.vocab_size - 2)

    def draw(self, draws: Draws, variant: int) -> Rows:
        shape = (len(draws.valid_R), self.length(variant))
        data_RM = draws.below(self.vocab_size - 2, self.num_data_tokens) + 1
        # Random places in rising order: the places of the smallest of as many random words as there are positions.
        places_RM = np.sort(np.argsort(draws.words(variant), axis=1, kind="stable")[:, : self.num_data_tokens], axis=1)
        tokens = np.zeros(shape, np.int64)
        np.put_along_axis(tokens, places_RM, data_RM, axis=1)
        tokens[:, variant:] = self.vocab_size - 1
        targets = np.zeros(shape, np.int64)
        targets[:, variant:] = data_RM
        loss_mask = np.zeros(shape, bool)
        loss_mask[:, variant:] = True
        return Rows(tokens, targets, loss_mask)
