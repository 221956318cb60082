"""What the supervisor needs of a way to start ranks: local processes, or a step of a Slurm job. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from launchers.lifecycle.exit_class import RankEnd


class Ranks(Protocol):
    """The started ranks of one attempt.

    ``killed`` are ranks that were killed by :meth:`kill`. Nothing here raises for a rank that is gone already.
    """

    killed: frozenset[int]

    def ends(self) -> Sequence[RankEnd]:
        """Ranks known to have ended, by rank. One whose end left no trace has ``code`` None, once all are over."""
        ...

    def num_running(self) -> int:
        """Ranks that still run; 0 when the attempt is over."""
        ...

    def ask_to_stop(self) -> None:
        """Asks all ranks to save and stop."""
        ...

    def dump_stacks(self) -> None:
        """Asks all ranks to write the stacks of their threads to their files."""
        ...

    def kill(self) -> None:
        """Ends all ranks at once, with helpers that outlived them."""
        ...

    def wait(self, seconds: float) -> None:
        """Returns when something may have changed, after ``seconds`` at the latest."""
        ...

    def out_of_memory(self) -> frozenset[int]:
        """Ranks that were killed for the host memory they used; -1 stands for some rank."""
        ...
