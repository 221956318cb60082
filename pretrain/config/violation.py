"""What is wrong with a configuration, said so that the reader can repair it. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One fault: a field's dotted ``path``, the value ``found`` there, the ``rule`` broken and a ``fix``."""

    path: str
    found: object
    rule: str
    fix: str


class InvalidConfigError(ValueError):
    """A configuration breaks rules. ``violations`` holds all of them, in the order they were found."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations: tuple[Violation, ...] = tuple(violations)
        assert self.violations, "an InvalidConfigError needs at least one violation"
        super().__init__(render(self.violations))


def render(violations: Sequence[Violation]) -> str:
    """One block of four lines per violation, paths flush left and the rest in a column."""
    count = len(violations)
    head = f"the configuration has {count} fault{'s' if count != 1 else ''}:"
    blocks = [
        f"  {v.path}\n    found  {_shown(v.found)}\n    rule   {_column(v.rule)}\n    fix    {_column(v.fix)}"
        for v in violations
    ]
    return "\n\n".join([head, *blocks])


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to ``word``, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 200 else text[:197] + "..."


def _column(text: str) -> str:
    return text.replace("\n", "\n" + " " * 11)
