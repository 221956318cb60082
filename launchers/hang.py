"""Hang detection from heartbeats: does an attempt still move, and if not, who holds it up?

Progress is judged by the watcher's own clock and by what changes from one look to the next, never by comparing clocks
of two machines.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launchers.heartbeat import Collective, Heartbeat, read_heartbeats
from launchers.lifecycle.journal import read_journal
from launchers.run_dir import RunDir
from pretrain.config.schema import Config

# A heartbeat may be late because a file system or a machine is busy.
_SILENT_AFTER_S = 30.0
_SILENT_AFTER_INTERVALS = 3.0

# A watcher that polls several times a second and was away for so long was suspended, with its ranks, or its machine
# stood still. Above the time that a batch system which does not answer holds it up: ranks run on meanwhile.
_AWAY_S = 25.0


@dataclass(frozen=True)
class Hang:
    """An attempt that does not move.

    ``rank`` is the culprit (None: nobody stands out), with its ``node``, ``phase``, last completed ``step`` and last
    ``collective``. ``reason`` is a sentence. ``culprits`` lists all ranks that hold the others up, ``rank`` first;
    ``silent`` those whose heartbeats stopped or never came. ``seconds`` is for how long nothing moved. ``beats`` are
    the last heartbeats of all ranks.
    """

    rank: int | None
    reason: str
    node: str | None = None
    phase: str | None = None
    step: int | None = None
    seconds: float = 0.0
    collective: Collective | None = None
    culprits: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    beats: list[Heartbeat] = field(default_factory=list)


@dataclass
class _Seen:
    """The last beat of a rank, and when (by the watcher's clock) the rank told something, and something new."""

    beat: Heartbeat
    told: float
    moved: float


class Watch:
    """Looks at the heartbeats of one attempt, whose ranks are being started now."""

    def __init__(self, run: RunDir, attempt: int, config: Config) -> None:
        self._run = run
        self._attempt = attempt
        self._lifecycle = config.lifecycle
        self._num_processes = config.launcher.num_processes
        self._seen: dict[int, _Seen] = {}
        self._began: float | None = None
        self._read: float | None = None
        self._polled: float | None = None

    def poll(self, now: float | None = None) -> Hang | None:
        """A hang, once nothing has moved for long enough, else None.

        Cheap: call it in every round of a supervisor; files are read at most twice per heartbeat interval. Time in
        which nobody called it for long is not counted: whatever held up the caller (a batch system that suspends the
        job, a machine that stands still) may have held up the ranks. ``now`` is in seconds of a clock that only grows
        (default: ``time.monotonic()``).
        """
        now = time.monotonic() if now is None else now
        if self._began is None:
            self._began = now
        away_s = min(_AWAY_S, max(1.0, self._lifecycle.hang_timeout_s / 4))
        if self._polled is not None and now - self._polled > away_s:
            self._pass_over(now - self._polled)
        self._polled = now
        if self._read is not None and now - self._read < self._lifecycle.heartbeat_interval_s / 2:
            return None
        self._read = now
        for beat in read_heartbeats(self._run, self._attempt):
            self._take(beat, now)
        still_s = now - max([self._began, *(seen.moved for seen in self._seen.values())])
        trained = any(seen.beat.steps for seen in self._seen.values())
        timeout_s = self._lifecycle.hang_timeout_s if trained else self._lifecycle.startup_timeout_s
        if still_s < timeout_s:
            return None
        beats = [self._seen[rank].beat for rank in sorted(self._seen)]
        hang = diagnose(beats, self._num_processes, self.silent(now), still_s)
        if hang.rank is not None and hang.node is None:
            hang = replace(hang, node=node_of(self._run, self._attempt, hang.rank))
        return hang

    def silent(self, now: float | None = None) -> dict[int, float]:
        """Ranks whose heartbeats stopped, with the seconds since the last one; those that ended are not among them."""
        now = time.monotonic() if now is None else now
        lifecycle = self._lifecycle
        after_s = max(
            _SILENT_AFTER_INTERVALS * lifecycle.heartbeat_interval_s,
            min(_SILENT_AFTER_S, lifecycle.hang_timeout_s / 2),
        )
        return {
            rank: now - seen.told
            for rank, seen in sorted(self._seen.items())
            if now - seen.told > after_s and seen.beat.phase != "stop"
        }

    def beats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank that has told one."""
        return [self._seen[rank].beat for rank in sorted(self._seen)]

    def _pass_over(self, seconds: float) -> None:
        assert self._began is not None
        self._began += seconds
        for seen in self._seen.values():
            seen.told += seconds
            seen.moved += seconds

    def _take(self, beat: Heartbeat, now: float) -> None:
        known = self._seen.get(beat.rank)
        if known is None:
            self._seen[beat.rank] = _Seen(beat, now, now)
            return
        if beat.time != known.beat.time:
            known.told = now
        if beat.progress != known.beat.progress:
            known.moved = now
        known.beat = beat


def diagnose(beats: Sequence[Heartbeat], num_processes: int, silent: Mapping[int, float], seconds: float = 0.0) -> Hang:
    """Who holds up an attempt in which nothing moves; a pure function of the last heartbeats.

    In this order: ranks that never told of themselves; ranks whose heartbeats stopped; ranks that others wait for in a
    collective while they are not in one; ranks that are in another collective than the others; with no collective
    known, the rank that stopped first.
    """
    told = {beat.rank: beat for beat in beats}
    missing = [rank for rank in range(num_processes) if rank not in told]
    if not told:
        words = f"none of the {num_processes} ranks has told of itself: their programs did not start, or cannot write"
        return Hang(None, f"{words} to the run directory", seconds=seconds, silent=missing)
    if missing:
        words = "never told of itself: its program did not start, or its node cannot write to the run directory"
        return _blame(missing, words, told, seconds, silent=[*missing, *silent])
    if silent and (len(silent) < num_processes or num_processes == 1):
        worst = sorted(silent, key=lambda rank: (-silent[rank], rank))
        words = (
            f"has not told of itself for {silent[worst[0]]:.0f} s while others did: it is dead, frozen, or stuck in "
            "a call that holds Python's interpreter"
        )
        if num_processes == 1:
            words = words.replace(" while others did", "")
        return _blame(worst, words, told, seconds, silent=worst)
    if silent:
        words = "all ranks have fallen silent: their machine, its network or the file system of the run directory"
        return Hang(None, words, seconds=seconds, silent=sorted(silent), beats=list(beats))
    waiting = {rank: beat.collective for rank, beat in told.items() if beat.collective and beat.collective.running}
    if waiting and len(waiting) < len(told):
        return _not_in_collective(told, waiting, seconds)
    if waiting:
        return _all_in_collectives(told, waiting, seconds)
    first = sorted(told, key=lambda rank: (_step(told[rank]), told[rank].phase_since, rank))
    if len(told) == 1:
        return _blame(first, "does not move", told, seconds)
    behind = [rank for rank in first if _step(told[rank]) < max(map(_step, told.values()))]
    if behind:
        return _blame(behind, f"is behind: others have completed step {max(map(_step, told.values()))}", told, seconds)
    return _blame(first[:1], "stopped first; no rank is known to be in a collective", told, seconds)


def node_of(run: RunDir, attempt: int, rank: int) -> str | None:
    """The node of a rank by the journal, ranks being dealt to nodes in blocks; None when it is not recorded."""
    for record in reversed(read_journal(run)):
        if record["event"] == "attempt_started" and record["attempt"] == attempt:
            nodes, size = record.get("nodes") or [], record.get("num_processes") or 0
            if nodes and size % len(nodes) == 0 and rank < size:
                return str(nodes[rank // (size // len(nodes))])
    return None


def _step(beat: Heartbeat) -> int:
    return -1 if beat.step is None else beat.step


def _not_in_collective(told: Mapping[int, Heartbeat], waiting: Mapping[int, Collective], seconds: float) -> Hang:
    """Some ranks wait in a collective, others are in none."""
    votes: Counter[int] = Counter()
    for collective in waiting.values():
        for rank in collective.ranks or told:
            if rank in told and rank not in waiting and _entered(told[rank], collective) < collective.count:
                votes[rank] += 1
    # Where none is known to be missing, a chain of groups leads to the ranks that wait for nobody.
    idle = [rank for rank in told if rank not in waiting]
    culprits = sorted(votes or idle, key=lambda rank: (-votes[rank], _step(told[rank]), rank))
    words = f"is in no collective while {_waiters(waiting)}"
    return _blame(culprits, words, told, seconds)


def _all_in_collectives(told: Mapping[int, Heartbeat], waiting: Mapping[int, Collective], seconds: float) -> Hang:
    """Every rank is in a collective: they are in different ones, or the connection between them stands still."""
    votes: Counter[int] = Counter()
    for waiter, collective in waiting.items():
        for rank in collective.ranks or told:
            if rank != waiter and rank in told and _entered(told[rank], collective) < collective.count:
                votes[rank] += 1
    names = Counter((c.group, c.count, c.name) for c in waiting.values())
    if not votes and len(names) > 1:
        # The same number under different names: the ranks' programs have gone different ways.
        usual = names.most_common(1)[0][0]
        for rank, c in waiting.items():
            if (c.group, c.count, c.name) != usual and c.group == usual[0]:
                votes[rank] += 1
    if not votes:
        words = f"{_waiters(waiting)}, and none is missing: the connection between nodes, or a device, does not answer"
        return Hang(None, words, seconds=seconds, beats=[told[rank] for rank in sorted(told)])
    culprits = sorted(votes, key=lambda rank: (-votes[rank], _step(told[rank]), rank))
    others = {rank: c for rank, c in waiting.items() if rank not in votes} or dict(waiting)
    own = waiting[culprits[0]]
    words = f"is in {name_of(own)} while {_waiters(others)}: the ranks' programs have gone different ways"
    return _blame(culprits, words, told, seconds)


def _entered(beat: Heartbeat, collective: Collective) -> int:
    """How many collectives of the same group the rank has entered; 0 where none is on record."""
    return beat.counts.get(collective.group, 0)


def name_of(collective: Collective) -> str:
    if not collective.count:
        return collective.name
    return f"{collective.name} no. {collective.count} of {collective.group or 'the default group'}"


def _waiters(waiting: Mapping[int, Collective]) -> str:
    """``ranks 0, 2 wait in all_reduce no. 7 of gloo default`` for the collective in which most ranks wait."""
    named = Counter(name_of(collective) for collective in waiting.values())
    words = named.most_common(1)[0][0]
    ranks = [rank for rank, collective in sorted(waiting.items()) if name_of(collective) == words]
    return f"rank {ranks[0]} waits in {words}" if len(ranks) == 1 else f"ranks {list_ranks(ranks)} wait in {words}"


def list_ranks(ranks: Sequence[int], shown: int = 8) -> str:
    """``0, 1, 2 and 5 more``."""
    text = ", ".join(str(rank) for rank in ranks[:shown])
    return text if len(ranks) <= shown else f"{text} and {len(ranks) - shown} more"


def _blame(
    culprits: Sequence[int],
    words: str,
    told: Mapping[int, Heartbeat],
    seconds: float,
    *,
    silent: Sequence[int] | None = None,
) -> Hang:
    rank = culprits[0]
    beat = told.get(rank)
    place = f"rank {rank}" + (f" on {beat.node}" if beat is not None else "")
    phase = f", in phase {beat.phase} after step {max(_step(beat), 0)}," if beat is not None else ""
    more = f"; so it is with {len(culprits) - 1} more: {list_ranks(culprits[1:])}" if len(culprits) > 1 else ""
    return Hang(
        rank,
        f"{place}{phase} {words}{more}",
        node=beat.node if beat is not None else None,
        phase=beat.phase if beat is not None else None,
        step=beat.step if beat is not None else None,
        seconds=seconds,
        collective=beat.collective if beat is not None else None,
        culprits=list(culprits),
        silent=sorted(silent) if silent is not None else [],
        beats=[told[number] for number in sorted(told)],
    )
