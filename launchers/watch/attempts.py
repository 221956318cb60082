"""The attempts of a run, out of its journal. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launchers.watch.files import Record, finite, integer, text, texts

GOES_ON = ("restart", "requeue", "exclude")
"""Actions after which a run goes on by itself."""


@dataclass(frozen=True)
class Attempt:
    """One attempt as the journal has it; ``ended`` is None while it goes on, or when nobody could record its end.

    Times in unix seconds.
    """

    number: int
    started: float | None = None
    ended: float | None = None
    job: str | None = None
    nodes: tuple[str, ...] = ()
    num_processes: int | None = None
    exit_class: str | None = None
    action: str | None = None
    reason: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    saved_step: int | None = None
    rank: int | None = None
    node: str | None = None
    code: int | None = None
    report: str | None = None


def read_attempts(journal: Sequence[Record]) -> tuple[Attempt, ...]:
    """The attempts in a journal's entries, in the order started."""
    attempts: dict[int, Attempt] = {}
    for entry in journal:
        event, when = entry["event"], finite(entry, "time")
        if event not in ("attempt_started", "attempt_ended"):
            continue
        attempt = integer(entry, "attempt")
        if attempt is None:
            continue
        if event == "attempt_started":
            attempts[attempt] = Attempt(
                attempt,
                started=when,
                job=text(entry, "job"),
                nodes=texts(entry, "nodes"),
                num_processes=integer(entry, "num_processes"),
            )
        else:
            attempts[attempt] = replace(
                attempts.get(attempt, Attempt(attempt)),
                ended=when,
                exit_class=text(entry, "exit_class") or "unknown",
                action=text(entry, "action"),
                reason=text(entry, "reason"),
                first_step=integer(entry, "first_step"),
                last_step=integer(entry, "last_step"),
                saved_step=integer(entry, "saved_step"),
                rank=integer(entry, "rank"),
                node=text(entry, "node"),
                code=integer(entry, "code"),
                report=text(entry, "report"),
            )
    return tuple(attempts.values())


def last_job(journal: Sequence[Record]) -> str | None:
    """The job of the last entry that names one; None for a run that was last started without Slurm."""
    for entry in reversed(journal):
        if entry["event"] in ("submitted", "requeued", "attempt_started"):
            return text(entry, "job")
    return None
