"""What follows the end of an attempt: a pure function of its class, the run's history and the configuration.

Torch-free. Nothing is read or done here, so every rule can be tried on made-up histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launchers.lifecycle.exit_class import ExitClass, Verdict
from launchers.lifecycle.journal import Entry
from pretrain.config.launch_schema import Action, LifecycleConfig

WANTED = frozenset({ExitClass.FINISHED, ExitClass.INTERRUPTED})
"""Ends that the user wanted: nothing follows."""

ALLOCATION_ENDS = frozenset({ExitClass.PREEMPTED, ExitClass.TIME_LIMIT})
"""Ends that take the allocation away: to start again at once is not possible."""


ADVICE = {
    ExitClass.DEVICE_MEMORY: "lower train.micro_batch_size (the result stays the same), or shard or offload more",
    ExitClass.HOST_MEMORY: "ask for more with cluster.memory_per_node, or offload less",
    ExitClass.NONFINITE: "look at the batch with `pretrain replay RUN --step N`; health.on_nonfinite=skip or rollback "
    "passes over such steps",
    ExitClass.DATA_FAULT: "`pretrain data verify` names all damage; restore the files, or have the rows substituted",
    ExitClass.TIME_LIMIT: "raise launcher.time_limit: the job ends before a new step is saved",
    ExitClass.HANG: "the report names the rank that holds the others up",
}
"""What a user may do about a class that stopped the run; the other messages say it themselves."""


@dataclass(frozen=True)
class Progress:
    """Steps of the run that an attempt completed: from ``first`` (exclusive) to ``last``; None: it never began."""

    first: int | None
    last: int | None


@dataclass(frozen=True)
class Place:
    """Where the next attempt could run.

    ``queue``: there is a batch system to give the allocation back to. ``can_stay``: the nodes that are left hold a
    layout of this run, so that it may go on at once; ``can_stay_without``: they do so without the node at fault, too.
    ``time_enough``: the rest of the allocation's time is worth another attempt.
    """

    queue: bool = False
    can_stay: bool = True
    can_stay_without: bool = True
    time_enough: bool = True


@dataclass(frozen=True)
class Decision:
    """``action``: stop, restart (at once), requeue, or exclude (``excluded`` nodes are left out from now on).

    ``at_once``: the next attempt starts in the allocation (or process) that is here; else in a new one.
    """

    action: Action
    at_once: bool
    excluded: tuple[str, ...]
    reason: str


def configured_action(exit_class: ExitClass, config: LifecycleConfig) -> Action:
    """The action that the configuration gives for a class; ends that the user wanted stop."""
    if exit_class in WANTED:
        return "stop"
    action: Action = getattr(config, f"on_{exit_class.value}")
    return action


def since_the_user_s_start(history: Sequence[Entry]) -> list[Entry]:
    """The ends of attempts since the run last stopped, or its user last submitted it: what is weighed up.

    Something may have been changed then, and the user may have gone back to an older checkpoint.
    """
    ended: list[Entry] = []
    for entry in history:
        if entry["event"] == "submitted" and entry.get("kind") != "chain":
            ended = []
        elif entry["event"] == "attempt_ended":
            ended = [] if entry["action"] == "stop" else [*ended, entry]
    return ended


def restarts_used(history: Sequence[Entry]) -> int:
    """Attempts that followed a fault by themselves since the user's own start.

    Time limits and preemptions that left new steps are no faults: a long run takes as many jobs as it takes.
    """
    ended = since_the_user_s_start(history)
    return sum(
        entry["exit_class"] not in ALLOCATION_ENDS or not _made_new_step(entry, ended[:position])
        for position, entry in enumerate(ended)
    )


def repeats(verdict: Verdict, progress: Progress, history: Sequence[Entry]) -> int:
    """Ends of this class in a row without a new step, this one included; 0 when this attempt made a new step.

    A user's own start begins a new row.
    """
    ended = since_the_user_s_start(history)
    if _is_new(progress.first, progress.last, ended):
        return 0
    count = 1
    for position in range(len(ended) - 1, -1, -1):
        entry = ended[position]
        if entry["exit_class"] != verdict.exit_class:
            break
        count += 1
        if _made_new_step(entry, ended[:position]):
            break  # the row began with the end of an attempt that had come further
    return count


def _made_new_step(entry: Entry, earlier: Sequence[Entry]) -> bool:
    return _is_new(entry.get("first_step"), entry.get("last_step"), earlier)


def _is_new(first: int | None, last: int | None, earlier: Sequence[Entry]) -> bool:
    """Whether an attempt came further than all before it, and than it began."""
    before = max((entry["last_step"] for entry in earlier if entry.get("last_step") is not None), default=-1)
    return last is not None and last > max(before, first if first is not None else -1)


def decide(
    verdict: Verdict,
    progress: Progress,
    history: Sequence[Entry],
    config: LifecycleConfig,
    max_restarts: int,
    place: Place,
) -> Decision:
    """What follows. ``history`` is the journal before this end.

    Without a batch system requeue and exclude are restart. In one, restart becomes requeue where the allocation ends
    or its time is too short, and exclude goes on at once where the remaining nodes hold a layout.
    """
    action = configured_action(verdict.exit_class, config)
    name = f"lifecycle.on_{verdict.exit_class.value}"
    if verdict.exit_class in WANTED:
        return Decision("stop", False, (), verdict.reason)
    if action == "stop":
        return _stop(verdict, f"{name} is stop")
    count = repeats(verdict, progress, history)
    if count >= config.max_repeats:
        row = f"{_times(count)} in a row without a new step"
        return _stop(verdict, f"{row} (lifecycle.max_repeats is {config.max_repeats}): trying again is no use")
    if max_restarts == 0:
        return _stop(verdict, "launcher.max_restarts is 0")
    used = restarts_used(history)
    if used >= max_restarts and not (verdict.exit_class in ALLOCATION_ENDS and count == 0):
        words = f"{used} of launcher.max_restarts = {max_restarts} restarts are used"
        way = "`pretrain resume` begins the count anew; raise launcher.max_restarts if so many are right"
        return _stop(verdict, words, way)
    words = f"{verdict.reason}; {name} is {action}"
    if not place.queue:
        return Decision("restart", True, (), words)
    ends = verdict.exit_class in ALLOCATION_ENDS
    if action == "exclude":
        excluded = (verdict.node,) if verdict.node is not None else ()
        if not excluded:
            words += ", but no node stands out"
        at_once = bool(excluded) and not ends and place.can_stay_without and place.time_enough
        if at_once:
            words += f": going on without {verdict.node}"
        return Decision("exclude" if excluded else "requeue", at_once, excluded, words)
    if action == "restart":
        if ends:
            return Decision("requeue", False, (), f"{words}, which needs a new allocation here")
        if not place.time_enough:
            return Decision("requeue", False, (), f"{words}, but the job's time is nearly over")
        if not place.can_stay:
            return Decision("requeue", False, (), f"{words}, but too few nodes are left")
        return Decision("restart", True, (), words)
    return Decision("requeue", False, (), words)


def _stop(verdict: Verdict, words: str, advice: str | None = None) -> Decision:
    advice = advice or ADVICE.get(verdict.exit_class)
    return Decision("stop", False, (), f"{verdict.reason}; {words}" + (f". What to do: {advice}" if advice else ""))


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
