"""Why an attempt ended: one class out of exit codes, signals, end records, Slurm's view and heartbeats. Torch-free.

:func:`classify` is a pure function of what is known (:class:`Evidence`); gathering that is the supervisor's.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from launchers.exit_codes import ExitCode, meaning


class ExitClass(StrEnum):
    """How an attempt ended. All but the first two have an action in the lifecycle's configuration."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"  # stopped by its user: a signal or a cancellation
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    NODE_FAILURE = "node_failure"
    DEVICE_MEMORY = "device_memory"
    HOST_MEMORY = "host_memory"
    NONFINITE = "nonfinite"
    HANG = "hang"
    DATA_FAULT = "data_fault"
    USER_ERROR = "user_error"
    KILLED = "killed"  # a rank died of a signal that nobody here sent
    CRASH = "crash"


_OF_CODE = {
    ExitCode.INVALID_INPUT: ExitClass.USER_ERROR,
    ExitCode.RUN_DIRECTORY_REFUSED: ExitClass.USER_ERROR,
    ExitCode.CORRUPTED_CHECKPOINT: ExitClass.USER_ERROR,
    ExitCode.NONFINITE: ExitClass.NONFINITE,
    ExitCode.DATA_FAULT: ExitClass.DATA_FAULT,
    ExitCode.DEVICE_MEMORY: ExitClass.DEVICE_MEMORY,
    ExitCode.HOST_MEMORY: ExitClass.HOST_MEMORY,
    ExitCode.NODE_FAULT: ExitClass.NODE_FAILURE,
}

STOP_CODES = frozenset({128 + signal.SIGTERM, 128 + signal.SIGUSR1})
"""Codes of ranks that died of a request to stop: the second signal is the way through srun alone."""

# What says most about the cause comes first: a rank that tells why it ended knows more than one that lost its peers.
_RANKING = (
    ExitClass.DEVICE_MEMORY,
    ExitClass.HOST_MEMORY,
    ExitClass.NONFINITE,
    ExitClass.DATA_FAULT,
    ExitClass.USER_ERROR,
    ExitClass.NODE_FAILURE,
)


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. ``code`` is a shell's exit code (128 + n for a signal n), None when it is not known.

    ``time`` is unix seconds. ``message`` is the rank's own account, if it could still write one. ``consequence`` is
    True when that account tells of lost peers, so that the cause lies elsewhere.
    """

    rank: int
    code: int | None
    node: str | None = None
    time: float | None = None
    message: str | None = None
    consequence: bool = False


@dataclass(frozen=True)
class StopReason:
    """Why the supervisor asked the ranks to stop: an exit class (INTERRUPTED, PREEMPTED, TIME_LIMIT, HANG) and words.

    ``enforced``: a batch system is ending the job itself; ranks that it kills meanwhile are no failures, and what is
    to be written must be written within seconds.
    """

    exit_class: ExitClass
    words: str
    rank: int | None = None
    node: str | None = None
    report: str | None = None
    enforced: bool = False


@dataclass(frozen=True)
class Evidence:
    """What is known at the end of an attempt.

    ``ends`` are the ranks' ends; ``killed_ranks`` those that the supervisor itself killed, ``asked`` whether it asked
    them to stop before they had all ended, and ``stop`` why, if it was for more than the first rank's failure.
    ``down_nodes`` are nodes that Slurm says have failed. ``out_of_memory`` are ranks (or -1: some rank) that the
    kernel or Slurm says were killed for memory. ``refused`` is why the run directory took no more files by then, if it
    did not.
    """

    ends: Sequence[RankEnd]
    stop: StopReason | None = None
    killed_ranks: frozenset[int] = frozenset()
    down_nodes: Sequence[str] = ()
    out_of_memory: frozenset[int] = frozenset()
    asked: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The class, the rank and node at fault where one is, that rank's exit code, and a sentence."""

    exit_class: ExitClass
    reason: str
    rank: int | None = None
    node: str | None = None
    code: int | None = None
    report: str | None = None


def classify(evidence: Evidence) -> Verdict:
    """The one class of an attempt's end.

    A failed node comes before what its loss did to ranks elsewhere. Then, ranks that all finished, or all saved and
    left, did so whatever was asked of them meanwhile. Then a hang that was found explains the kill that ended it. Then
    the cause among failing ranks: of those that ended by themselves, the one whose end tells most; a rank that only
    lost its peers comes last.
    """
    ends = list(evidence.ends)
    codes = {end.code for end in ends}
    if ends and codes == {int(ExitCode.FINISHED)}:
        return Verdict(ExitClass.FINISHED, "all ranks finished", code=0)
    if evidence.down_nodes:
        node = evidence.down_nodes[0]
        lost = next((end for end in ends if end.node == node), None)
        words = ", ".join(evidence.down_nodes)
        rank = lost.rank if lost else None
        return Verdict(ExitClass.NODE_FAILURE, f"node {words} is down", rank=rank, node=node)
    stop = evidence.stop
    if ends and codes <= {int(ExitCode.FINISHED), int(ExitCode.RESUMABLE)}:
        return _saved(stop)
    if stop is not None and stop.exit_class == ExitClass.HANG:
        return Verdict(ExitClass.HANG, stop.words, stop.rank, stop.node, report=stop.report)
    cause = find_cause(evidence)
    if evidence.refused is not None and (verdict := _without_room(evidence.refused, cause, evidence)) is not None:
        return verdict
    if (cause is None or cause.consequence) and (silent := _silent_node(evidence)) is not None:
        lost = next(end for end in ends if end.node == silent)
        words = f"node {silent} fell silent: none of its ranks told of its end"
        return Verdict(ExitClass.NODE_FAILURE, words, lost.rank, silent)
    if cause is not None:
        return _failure(cause, evidence)
    if stop is not None:
        # Nobody failed by itself: the ranks did not stop in time and were killed.
        return Verdict(stop.exit_class, f"{stop.words}; the ranks did not end in time and were killed")
    return Verdict(ExitClass.KILLED, "the ranks were killed from outside")


def find_cause(evidence: Evidence) -> RankEnd | None:
    """The rank whose end brought the others down; None when none failed by itself."""
    own = [
        end
        for end in evidence.ends
        if end.rank not in evidence.killed_ranks and end.code not in (None, ExitCode.FINISHED, ExitCode.RESUMABLE)
    ]
    # Ranks asked to stop may die of that very signal when they are caught before, or after, they can handle it.
    explained = set(STOP_CODES) if evidence.asked or evidence.stop is not None else set()
    if evidence.stop is not None and evidence.stop.enforced:
        explained.add(128 + signal.SIGKILL)
    own = [end for end in own if end.code not in explained]

    def weight(end: RankEnd) -> tuple[int, float, int]:
        of_code = _class_of(end, evidence)
        if end.consequence:
            place = 3
        elif of_code in _RANKING or (end.code is not None and end.code > 128):
            place = 0 if end.code != 128 + signal.SIGTERM else 2
        else:
            place = 1
        return place, end.time if end.time is not None else float("inf"), end.rank

    return min(own, key=weight, default=None)


def _silent_node(evidence: Evidence) -> str | None:
    """A node all of whose ranks ended without a trace, while those of other nodes left one; None when none stands
    out. A batch system takes a while to notice that a node is dead; ranks elsewhere notice at once."""
    traces: dict[str, bool] = {}
    for end in evidence.ends:
        if end.node is not None:
            traces[end.node] = traces.get(end.node, False) or end.code is not None
    silent = [node for node, trace in traces.items() if not trace]
    return silent[0] if len(silent) == 1 and len(traces) > 1 else None


def _class_of(end: RankEnd, evidence: Evidence) -> ExitClass:
    assert end.code is not None
    if end.code in (128 + signal.SIGKILL, ExitCode.FAILED) and {end.rank, -1} & evidence.out_of_memory:
        return ExitClass.HOST_MEMORY
    return class_of_code(end.code)


def class_of_code(code: int) -> ExitClass:
    """The class that an exit code alone speaks for."""
    if code in _OF_CODE:
        return _OF_CODE[ExitCode(code)]
    if code == ExitCode.FINISHED:
        return ExitClass.FINISHED
    if code == ExitCode.RESUMABLE:
        return ExitClass.INTERRUPTED
    return ExitClass.KILLED if code > 128 else ExitClass.CRASH


def _failure(cause: RankEnd, evidence: Evidence) -> Verdict:
    assert cause.code is not None
    exit_class = _class_of(cause, evidence)
    where = f" on {cause.node}" if cause.node else ""
    words = f"rank {cause.rank}{where} ended with code {cause.code} ({meaning(cause.code)})"
    if exit_class == ExitClass.HOST_MEMORY and cause.code != ExitCode.HOST_MEMORY:
        words += ", killed for the memory it used"
    if cause.message:
        words += f": {' '.join(cause.message.split())[:500]}"
    return Verdict(exit_class, words, cause.rank, cause.node, cause.code)


def _without_room(refused: str, cause: RankEnd | None, evidence: Evidence) -> Verdict | None:
    """A run directory that takes no files explains ranks that crash, and those whose account could not be kept."""
    if cause is None:
        if evidence.stop is not None:
            return None
        return Verdict(ExitClass.USER_ERROR, f"{refused}: the ranks could leave no account of their end")
    if _class_of(cause, evidence) not in (ExitClass.CRASH, ExitClass.KILLED):
        return None
    failure = _failure(cause, evidence)
    return replace(failure, exit_class=ExitClass.USER_ERROR, reason=f"{refused}: {failure.reason}")


def _saved(stop: StopReason | None) -> Verdict:
    if stop is None:
        return Verdict(ExitClass.INTERRUPTED, "the ranks were asked to stop and saved", code=int(ExitCode.RESUMABLE))
    # A hang that resolved itself before anyone was killed ended in a good checkpoint, yet it was a hang.
    words = f"{stop.words}; the ranks saved"
    return Verdict(stop.exit_class, words, stop.rank, stop.node, int(ExitCode.RESUMABLE), stop.report)
