"""What follows the end of an attempt: the rules on made-up histories, and whole lives of runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.lifecycle.exit_class import ExitClass, Verdict
from launchers.lifecycle.policy import Decision, Place, Progress, configured_action, decide, repeats, restarts_used
from pretrain.config.launch_schema import LifecycleConfig

CONFIG = LifecycleConfig()
SLURM = Place(queue=True)
FAILURES = [c for c in ExitClass if c not in (ExitClass.FINISHED, ExitClass.INTERRUPTED)]
ACTIONS = ("stop", "restart", "requeue", "exclude")


def ended(exit_class: str, action: str, last: int | None = None, first: int | None = 0) -> dict[str, Any]:
    return {
        "event": "attempt_ended",
        "exit_class": exit_class,
        "action": action,
        "first_step": None if last is None else first,
        "last_step": last,
    }


def verdict(exit_class: ExitClass, node: str | None = "n2") -> Verdict:
    return Verdict(exit_class, f"it was {exit_class}", rank=1, node=node, code=1)


def test_what_the_user_wanted_stops() -> None:
    for exit_class in (ExitClass.FINISHED, ExitClass.INTERRUPTED):
        decision = decide(verdict(exit_class), Progress(0, 9), [], CONFIG, 20, SLURM)
        assert (decision.action, decision.at_once) == ("stop", False)


@pytest.mark.parametrize(
    ("exit_class", "action", "at_once"),
    [
        (ExitClass.PREEMPTED, "requeue", False),
        (ExitClass.TIME_LIMIT, "requeue", False),
        (ExitClass.NODE_FAILURE, "exclude", True),
        (ExitClass.DEVICE_MEMORY, "stop", False),
        (ExitClass.HOST_MEMORY, "requeue", False),
        (ExitClass.NONFINITE, "stop", False),
        (ExitClass.HANG, "restart", True),
        (ExitClass.DATA_FAULT, "stop", False),
        (ExitClass.USER_ERROR, "stop", False),
        (ExitClass.KILLED, "restart", True),
        (ExitClass.CRASH, "restart", True),
    ],
)
def test_the_shipped_policy(exit_class: ExitClass, action: str, at_once: bool) -> None:
    decision = decide(verdict(exit_class), Progress(0, 9), [], CONFIG, 20, SLURM)
    assert (decision.action, decision.at_once) == (action, at_once)
    assert decision.excluded == (("n2",) if action == "exclude" else ())


def test_too_few_nodes_or_too_little_time_go_through_the_queue() -> None:
    crash, node = verdict(ExitClass.CRASH), verdict(ExitClass.NODE_FAILURE)
    few = replace(SLURM, can_stay=False, can_stay_without=False)
    late, just_enough = replace(SLURM, time_enough=False), replace(SLURM, can_stay_without=False)
    for place in (few, late):
        assert decide(crash, Progress(0, 9), [], CONFIG, 20, place).action == "requeue"
    for place in (few, late, just_enough):
        gone = decide(node, Progress(0, 9), [], CONFIG, 20, place)
        assert (gone.action, gone.at_once, gone.excluded) == ("exclude", False, ("n2",))
    # A rank that died on a sound node is started again there.
    assert decide(crash, Progress(0, 9), [], CONFIG, 20, just_enough).action == "restart"


def test_an_allocation_that_ends_cannot_serve_again() -> None:
    config = replace(CONFIG, on_preempted="restart", on_time_limit="exclude")
    for exit_class in (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT):
        decision = decide(verdict(exit_class, node=None), Progress(0, 9), [], config, 20, SLURM)
        assert (decision.action, decision.at_once) == ("requeue", False)


def test_without_a_node_to_blame_nothing_is_excluded() -> None:
    decision = decide(verdict(ExitClass.NODE_FAILURE, node=None), Progress(0, 9), [], CONFIG, 20, SLURM)
    assert (decision.action, decision.excluded) == ("requeue", ())
    assert "no node stands out" in decision.reason


def test_a_crash_loop_is_broken_and_says_so() -> None:
    crash, history = verdict(ExitClass.CRASH), [ended("crash", "restart", 5), ended("crash", "restart", 5)]
    assert repeats(crash, Progress(4, 5), history) == 3
    decision = decide(crash, Progress(4, 5), history, CONFIG, 20, SLURM)
    assert decision.action == "stop"
    assert "3 times in a row without a new step" in decision.reason
    assert "lifecycle.max_repeats is 3" in decision.reason
    # One step further each time: a fault now and then, not a loop.
    assert repeats(crash, Progress(4, 6), history) == 0
    assert decide(crash, Progress(4, 6), history, CONFIG, 20, SLURM).action == "restart"


def test_another_class_or_a_user_s_start_begins_a_new_row() -> None:
    crash = verdict(ExitClass.CRASH)
    stuck = [ended("crash", "restart", None)] * 2
    assert repeats(crash, Progress(None, None), stuck) == 3
    assert repeats(crash, Progress(None, None), [*stuck, ended("hang", "restart", None)]) == 1
    assert repeats(crash, Progress(None, None), [*stuck, ended("crash", "stop", None)]) == 1
    # Steps that were only done again after going back are not new.
    assert repeats(crash, Progress(0, 5), [ended("crash", "restart", 9), ended("crash", "restart", 7, 4)]) == 3


def test_the_budget_counts_faults_since_the_user_s_start() -> None:
    earlier = [ended("crash", "restart", 5), ended("hang", "stop", 7)]
    submitted = {"event": "submitted", "kind": "resume"}
    for before in ([], earlier, [ended("crash", "restart", 5), submitted]):
        assert restarts_used([*before, ended("killed", "restart", 9), {"event": "submitted", "kind": "chain"}]) == 1
    history = [*earlier, ended("killed", "restart", 9), ended("crash", "restart", 11, 9)]
    assert restarts_used(history) == 2
    crash = verdict(ExitClass.CRASH)
    assert decide(crash, Progress(11, 12), history, CONFIG, 3, SLURM).action == "restart"
    spent = decide(crash, Progress(11, 12), history, CONFIG, 2, SLURM)
    assert spent.action == "stop"
    assert "2 of launcher.max_restarts = 2" in spent.reason
    assert "raise launcher.max_restarts" in spent.reason
    assert "launcher.max_restarts is 0" in decide(crash, Progress(0, 1), [], CONFIG, 0, Place()).reason


@pytest.mark.parametrize("exit_class", [ExitClass.TIME_LIMIT, ExitClass.PREEMPTED])
def test_a_long_run_takes_as_many_jobs_as_it_takes(exit_class: ExitClass) -> None:
    history = [ended(exit_class, "requeue", 100 * (n + 1), 100 * n) for n in range(50)]
    assert restarts_used(history) == 0
    left = verdict(exit_class, node=None)
    assert decide(left, Progress(5000, 5100), history, CONFIG, 20, SLURM).action == "requeue"
    # Jobs that end before they have come further cost the budget, and break the loop.
    stuck = [*history, ended(exit_class, "requeue", 5000, 5000)]
    assert restarts_used(stuck) == 1
    assert decide(left, Progress(5000, 5000), stuck, CONFIG, 1, SLURM).action == "stop"
    assert decide(left, Progress(5000, 5100), stuck, CONFIG, 1, SLURM).action == "requeue"
    # Who allows no restarts gets none.
    assert decide(left, Progress(5000, 5100), history, CONFIG, 0, SLURM).action == "stop"


@pytest.mark.parametrize("start", [ended("interrupted", "stop", 1000), {"event": "submitted", "kind": "resume"}])
def test_steps_after_going_back_by_hand_are_new(start: dict[str, Any]) -> None:
    history = [ended("time_limit", "requeue", 1000), start]
    for first in (100, 200, 300, 400):
        progress = Progress(first, first + 100)
        assert repeats(verdict(ExitClass.TIME_LIMIT), progress, history) == 0
        assert decide(verdict(ExitClass.TIME_LIMIT), progress, history, CONFIG, 20, SLURM).action == "requeue"
        history.append(ended("time_limit", "requeue", progress.last, progress.first))
    # Going back once more by a rollback or fault does not count as getting on.
    assert repeats(verdict(ExitClass.TIME_LIMIT), Progress(400, 500), history) == 2


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[tuple[Verdict, Progress, Place]], LifecycleConfig, int]:
    fields = {f"on_{c}": draw(st.sampled_from(ACTIONS)) for c in FAILURES}
    config = LifecycleConfig(**fields, max_repeats=draw(st.integers(1, 4)))
    queue = draw(st.booleans())
    step = st.one_of(st.none(), st.integers(0, 8))
    ends = []
    for _ in range(draw(st.integers(1, 25))):
        exit_class = draw(st.sampled_from(FAILURES))
        last = draw(step)
        first = None if last is None else draw(st.integers(0, last))
        place = Place(queue, *(draw(st.booleans()) for _ in range(3))) if queue else Place()
        ends.append((verdict(exit_class, draw(st.sampled_from([None, "n1", "n2"]))), Progress(first, last), place))
    return ends, config, draw(st.integers(0, 10))


def live(
    ends: list[tuple[Verdict, Progress, Place]], config: LifecycleConfig, max_restarts: int
) -> list[tuple[Verdict, Progress, Place, Decision]]:
    """The decisions of a run up to its stop."""
    history: list[dict[str, Any]] = []
    decided = []
    for end, progress, place in ends:
        decision = decide(end, progress, history, config, max_restarts, place)
        decided.append((end, progress, place, decision))
        history.append(
            ended(str(end.exit_class), decision.action, progress.last, progress.first) | {"action": decision.action}
        )
        if decision.action == "stop":
            break
    return decided


@settings(deadline=None)
@given(lives())
def test_lives_of_runs(life: tuple[list[tuple[Verdict, Progress, Place]], LifecycleConfig, int]) -> None:
    ends, config, max_restarts = life
    decided = live(ends, config, max_restarts)
    best, costly, gone_on = -1, 0, 0
    for end, progress, _, decision in decided:
        fresh = progress.last is not None and progress.last > max(best, progress.first or 0)
        best = max(best, progress.last if progress.last is not None else -1)
        gone_on += decision.action != "stop"
        costly += decision.action != "stop" and not (
            fresh and end.exit_class in (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT)
        )
    assert costly <= max_restarts
    assert gone_on <= costly + 9 * (max_restarts > 0), "each free one comes further, and there are nine steps"
    for end, _, place, decision in decided:
        assert decision.reason.startswith(end.reason)
        assert decision.action in ACTIONS
        if configured_action(end.exit_class, config) == "stop":
            assert decision.action == "stop"
        if decision.action == "stop":
            assert not decision.at_once
        if not place.queue:
            assert decision.action in ("stop", "restart")
            assert decision.at_once == (decision.action == "restart")
        if decision.action == "restart":
            assert decision.at_once
        if decision.action == "requeue":
            assert not decision.at_once
        assert bool(decision.excluded) == (decision.action == "exclude")
        if decision.at_once and place.queue:
            assert place.can_stay_without if decision.action == "exclude" else place.can_stay
            assert place.time_enough
            assert end.exit_class not in (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT)
    # No row of ends of one class without a new step is longer than the brake allows.
    row, best, previous = 0, -1, None
    for end, progress, _, decision in decided:
        fresh = progress.last is not None and progress.last > max(best, progress.first or 0)
        best = max(best, progress.last if progress.last is not None else -1)
        row = (0 if fresh else 1) if end.exit_class != previous or fresh else row + 1
        previous = end.exit_class
        if decision.action != "stop":
            assert row < config.max_repeats
