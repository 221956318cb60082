"""Rows that are made up on the spot: a ``SampleSource`` over a task, with nothing to store or to remember.

R = rows, S = positions in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.source import SourcePart
from data_pipeline.synthetic.draws import Draws, key_of, mixed

SYNTHETIC = "synthetic-1"
_VALIDATION_SHARE = 8  # one of so many possible rows belongs to validation
_MOST_ATTEMPTS = 1000
LEAST_ROWS = 256
"""Different rows that a task must have: that none of so many is for validation has a probability of 1e-15."""


@dataclass
class Rows:
    """Rows of one length. ``tokens`` int64 [R, S]; ``targets`` int64 [R, S], of which those in ``loss_mask`` count."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray


class Task(Protocol):
    """What a task of this package is, by its configuration."""

    def describe(self) -> str:
        """Name and every field that the rows depend on."""
        ...

    def length(self, variant: int) -> int:
        """Positions in a row of this variant."""
        ...

    def log2_rows(self, variant: int) -> float:
        """log2 of how many different rows of this variant there are, or of fewer."""
        ...

    def draw(self, draws: Draws, variant: int) -> Rows:
        """One row for each row of ``draws``."""
        ...


class SyntheticSource:
    """Rows of a task by global sample index, as :class:`data_pipeline.source.SampleSource`.

    A training source is endless; each row draws one of the ``variants`` (of the task's difficulty) and is padded to the
    longest of them. A validation source holds ``samples_per_variant`` rows of each, in parts called
    ``<variant>_<unit>``.

    Which rows belong to validation follows from a hash of their tokens: rows of the other kind are drawn again. So no
    training row of any seed is ever a validation row, and nothing but that hash tells them apart.
    """

    num_bytes = None

    def __init__(
        self, task: Task, variants: Sequence[int], unit: str, seed: int, samples_per_variant: int | None = None
    ) -> None:
        self._task = task
        self._variants = list(variants)
        self._per_variant = samples_per_variant
        self._split = "train" if samples_per_variant is None else "validation"
        self._key = key_of(SYNTHETIC, task.describe(), seed, samples_per_variant is not None)
        self._length = max(task.length(variant) for variant in variants)
        parts = [task.describe(), self._variants, seed, samples_per_variant]
        self.fingerprint = f"{SYNTHETIC} {key_of(*parts):016x}"
        self.num_samples = None if samples_per_variant is None else samples_per_variant * len(self._variants)
        if samples_per_variant is not None:
            self.parts = [SourcePart(f"{variant}_{unit}", samples_per_variant) for variant in self._variants]

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """As :func:`data_pipeline.batch.unpack` makes them, one document a row; validation rows of one part together
        are as long as they need, others are padded to the longest variant."""
        numbers_R = np.array(indices, dtype=np.int64)
        which_R = self._which(numbers_R)
        present = sorted(set(which_R.tolist()))
        length = self._length
        if self._per_variant is not None:
            length = max((self._task.length(self._variants[number]) for number in present), default=length)
        num_rows = len(numbers_R)
        tokens = np.zeros((num_rows, length), dtype=np.int32)
        targets = np.zeros_like(tokens)
        loss_mask = np.zeros((num_rows, length), dtype=bool)
        seq_idx = np.full((num_rows, length), -1, dtype=np.int32)
        for number in present:
            chosen = np.flatnonzero(which_R == number)
            rows, _ = self._draw(numbers_R[chosen], self._variants[number])
            width = rows.tokens.shape[1]
            tokens[chosen, :width] = rows.tokens
            targets[chosen, :width] = np.where(rows.loss_mask, rows.targets, 0)
            loss_mask[chosen, :width] = rows.loss_mask
            seq_idx[chosen, :width] = 0
        position_ids = np.where(seq_idx == 0, np.arange(length, dtype=np.int32), np.int32(0))
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": loss_mask,
            "seq_idx": seq_idx,
            "position_ids": position_ids,
        }

    def provenance(self, index: int) -> list[dict[str, Any]]:
        """How the row is made: task, variant, and how often it was drawn until it fitted the split."""
        numbers = np.array([index], dtype=np.int64)
        variant = self._variants[int(self._which(numbers)[0])]
        _, attempts = self._draw(numbers, variant)
        described = {"task": self._task.describe(), "split": self._split, "variant": variant}
        return [{**described, "sample": int(index), "draws": int(attempts[0])}]

    def close(self) -> None:
        """Nothing is held."""

    def _which(self, numbers_R: np.ndarray) -> np.ndarray:
        """Variant (its place in the list) of each row."""
        if self._per_variant is None:
            return Draws(key_of(self._key, "variant"), numbers_R).below(len(self._variants), 1)[:, 0]
        outside = (numbers_R < 0) | (numbers_R >= (self.num_samples or 0))
        if outside.any():
            raise IndexError(f"sample {numbers_R[outside][0]} is outside the {self.num_samples} samples of this source")
        return numbers_R // self._per_variant

    def _draw(self, numbers_R: np.ndarray, variant: int) -> tuple[Rows, np.ndarray]:
        """Rows of one variant that belong to this split, and the number of draws that each took."""
        length = self._task.length(variant)
        shape = (len(numbers_R), length)
        result = Rows(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool))
        attempts_R = np.zeros(len(numbers_R), dtype=np.int64)
        missing = np.arange(len(numbers_R))
        for attempt in range(_MOST_ATTEMPTS):
            draws = Draws(self._key, numbers_R[missing], attempt)
            rows = self._task.draw(draws, variant)
            assert rows.tokens.shape == (len(missing), length)
            fits = draws.valid_R & (_is_validation(rows.tokens) == (self._per_variant is not None))
            done = missing[fits]
            result.tokens[done], result.targets[done] = rows.tokens[fits], rows.targets[fits]
            result.loss_mask[done] = rows.loss_mask[fits]
            attempts_R[done] = attempt + 1
            missing = missing[~fits]
            if not len(missing):
                return result, attempts_R
        raise ValueError(
            f"{self._task.describe()}: no row for the {self._split} split in {_MOST_ATTEMPTS} draws: the task has too "
            "few different rows. What to do: raise its vocabulary or length."
        )


def _is_validation(tokens_RS: np.ndarray) -> np.ndarray:
    """bool [R], a hash of the row: true for one in eight of all possible rows."""
    places_S = np.arange(tokens_RS.shape[1], dtype=np.uint64) << np.uint64(32)
    folded_R = mixed(tokens_RS.astype(np.uint64) + places_S).sum(axis=1, dtype=np.uint64)
    return mixed(folded_R) % np.uint64(_VALIDATION_SHARE) == 0
