"""Where attempts run, as the supervisor sees it: local processes, or nodes of a batch job. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from launchers.lifecycle import journal
from launchers.lifecycle.exit_class import ExitClass, StopReason, Verdict
from launchers.lifecycle.ranks import Ranks
from launchers.run_dir import RunDir
from pretrain.config.schema import Config


class Backend(Protocol):
    """A place where attempts run.

    ``queue``: there is a batch system that nodes can be given back to. ``job``: the batch job that this process is
    part of. ``second_signal_kills``: a second signal means impatience (a user's), not a reminder (Slurm's).
    ``kill_wait_s``: seconds between a batch system's last signal and its killing everything.
    """

    name: str
    job: int | None
    queue: bool
    second_signal_kills: bool
    kill_wait_s: float

    def prepare(self, run: RunDir, config: Config, excluded: frozenset[str]) -> Config:
        """The configuration that the next attempt runs with: fewer nodes, say, frozen as a revision of the run.

        Raises TooFewNodesError when no layout fits what is there.
        """
        ...

    def nodes(self, config: Config) -> list[str]:
        """Nodes of the next attempt, in the order of ranks."""
        ...

    def check_nodes(self, run: RunDir, config: Config, attempt: int) -> NodeTrouble | None:
        """What a quick check of the nodes finds before ranks are started; None: they are well."""
        ...

    def start(self, run: RunDir, config: Config, attempt: int, program: Sequence[str]) -> AbstractContextManager[Ranks]:
        """Starts the ranks; on the way out none is left. Raises StartError."""
        ...

    def can_stay(self, run: RunDir, config: Config, excluded: frozenset[str]) -> bool:
        """Whether the nodes that are here hold a layout of the run without ``excluded``."""
        ...

    def end_time(self) -> float | None:
        """Unix time at which the nodes are taken away; None: never."""
        ...

    def down_nodes(self, config: Config) -> list[str]:
        """Nodes of this attempt that are known to have failed."""
        ...

    def reason_of(self, number: int | None) -> StopReason | None:
        """What a signal to this process means, None: nothing yet. None for ``number``: whether the batch system is
        ending the job."""
        ...

    def vanished(self, started: journal.Entry, last_sign: float) -> Verdict:
        """Why an attempt has no recorded end; ``started`` is the journal's entry of its start, ``last_sign`` the unix
        time at which a rank last told of itself."""
        ...


class TooFewNodesError(RuntimeError):
    """No layout of the run fits the nodes that are left."""


class StartError(RuntimeError):
    """The ranks could not be started; ``exit_class`` says whose matter that is."""

    def __init__(self, message: str, exit_class: ExitClass) -> None:
        super().__init__(message)
        self.exit_class = exit_class


@dataclass(frozen=True)
class NodeTrouble:
    """Nodes that failed the check before training, and what is wrong."""

    nodes: tuple[str, ...]
    words: str
