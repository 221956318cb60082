"""One class for each way in which an attempt may end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.exit_codes import ExitCode
from launchers.lifecycle.end_record import read_end_records, write_end_record
from launchers.lifecycle.exit_class import Evidence, ExitClass, RankEnd, StopReason, class_of_code, classify
from launchers.lifecycle.memory import OomKills, oom_kills
from launchers.run_dir import RunDir

KILL, TERM, SEGV = (128 + number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV))
LOST = "RuntimeError: Connection closed by peer"


def ends(*codes: int | None, nodes: tuple[str, ...] = ("a", "a", "b", "b")) -> list[RankEnd]:
    return [RankEnd(rank, code, nodes[rank]) for rank, code in enumerate(codes)]


def of(evidence: Evidence) -> tuple[str, int | None, str | None]:
    verdict = classify(evidence)
    assert verdict.reason
    return str(verdict.exit_class), verdict.rank, verdict.node


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ExitCode.FAILED, "crash"),
        (ExitCode.INVALID_INPUT, "user_error"),
        (ExitCode.RUN_DIRECTORY_REFUSED, "user_error"),
        (ExitCode.CORRUPTED_CHECKPOINT, "user_error"),
        (ExitCode.NONFINITE, "nonfinite"),
        (ExitCode.DATA_FAULT, "data_fault"),
        (ExitCode.DEVICE_MEMORY, "device_memory"),
        (ExitCode.HOST_MEMORY, "host_memory"),
        (ExitCode.NODE_FAULT, "node_failure"),
        (KILL, "killed"),
        (SEGV, "killed"),
        (17, "crash"),
    ],
)
def test_a_code_has_its_class(code: int, expected: str) -> None:
    # The other ranks only lost a peer, or were asked to stop and killed in the end.
    others = [RankEnd(0, 1, "a", message=LOST, consequence=True), RankEnd(2, KILL, "b"), RankEnd(3, TERM, "b")]
    own = RankEnd(1, code, "a", message="the cause")
    evidence = Evidence([*others, own], killed_ranks=frozenset({2}), asked=True)
    assert of(evidence) == (expected, 1, "a")
    assert "the cause" in classify(evidence).reason
    assert class_of_code(code) == expected


@pytest.mark.parametrize(
    ("codes", "stop", "expected"),
    [
        ((None, None, None, None), None, ("user_error", None)),  # no account could be kept
        ((None, 1, None, None), None, ("user_error", 1)),
        ((None, 128 + signal.SIGBUS, 1, None), None, ("user_error", 1)),  # a mapped page without a block
        ((None, ExitCode.DATA_FAULT, 1, None), None, ("data_fault", 1)),  # says more about the cause
        ((None, None, None, None), StopReason(ExitClass.PREEMPTED, "preempted"), ("preempted", None)),
        ((85, 85, 85, 85), None, ("interrupted", None)),
    ],
)
def test_run_directory_that_takes_no_files(
    codes: tuple[int | None, ...], stop: StopReason | None, expected: tuple[str, int | None]
) -> None:
    verdict = classify(Evidence(ends(*codes), stop=stop, refused="/runs/x takes no more files (make room there)"))
    assert (verdict.exit_class, verdict.rank) == expected
    assert verdict.reason.startswith("/runs/x takes no more files (make room there): ") == (expected[0] == "user_error")


def test_all_finished_whatever_was_asked() -> None:
    stop = StopReason(ExitClass.TIME_LIMIT, "the end is near")
    assert of(Evidence(ends(0, 0, 0, 0), stop)) == ("finished", None, None)


def test_saved_and_left_is_of_the_class_that_asked() -> None:
    saved = ends(85, 85, 85, 85)
    assert of(Evidence(saved)) == ("interrupted", None, None)
    for exit_class in (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT, ExitClass.INTERRUPTED):
        assert of(Evidence(saved, StopReason(exit_class, "asked"))) == (str(exit_class), None, None)
    # Some had finished before the request reached the others.
    assert of(Evidence(ends(0, 85, 0, 85), StopReason(ExitClass.PREEMPTED, "asked")))[0] == "preempted"


def test_a_down_node_explains_what_its_loss_did_elsewhere() -> None:
    lost = [
        RankEnd(0, 1, "a", message=LOST, consequence=True),
        RankEnd(1, 1, "a", message=LOST, consequence=True),
        *ends(None, None, None, None)[2:],
    ]
    assert of(Evidence(lost, down_nodes=["b"])) == ("node_failure", 2, "b")
    # Before Slurm has noticed: a node all of whose ranks are gone without a trace.
    assert of(Evidence(lost)) == ("node_failure", 2, "b")


def test_a_failure_of_its_own_is_not_put_on_a_silent_node() -> None:
    mixed = [RankEnd(0, ExitCode.NONFINITE, "a"), RankEnd(1, None, "b")]
    assert of(Evidence(mixed)) == ("nonfinite", 0, "a")


def test_a_hang_explains_the_kill_that_ended_it() -> None:
    hang = StopReason(ExitClass.HANG, "rank 3 stands in forward", 3, "b", "reports/hang.md")
    verdict = classify(Evidence(ends(KILL, KILL, KILL, KILL), hang, killed_ranks=frozenset(range(4))))
    assert (verdict.exit_class, verdict.rank, verdict.node, verdict.report) == ("hang", 3, "b", "reports/hang.md")


def test_a_rank_out_of_memory_is_no_mere_kill() -> None:
    killed = ends(1, KILL, 1, 1)
    killed = [end if end.code == KILL else RankEnd(end.rank, 1, end.node, consequence=True) for end in killed]
    assert of(Evidence(killed))[:2] == ("killed", 1)
    assert of(Evidence(killed, out_of_memory=frozenset({-1})))[:2] == ("host_memory", 1)
    assert of(Evidence(killed, out_of_memory=frozenset({1})))[:2] == ("host_memory", 1)
    assert of(Evidence(killed, out_of_memory=frozenset({0})))[0] == "killed"


def test_ranks_that_did_not_stop_in_time_are_of_the_class_that_asked() -> None:
    stop = StopReason(ExitClass.PREEMPTED, "the job is preempted")
    assert of(Evidence(ends(KILL, KILL), stop, killed_ranks=frozenset({0, 1})))[0] == "preempted"
    # Caught by the request before they could handle it.
    assert of(Evidence(ends(TERM, TERM), stop))[0] == "preempted"
    # Killed by somebody else while they saved: not what was asked for, unless the batch system enforces it.
    assert of(Evidence(ends(KILL, 85), stop))[0] == "killed"
    enforced = StopReason(ExitClass.PREEMPTED, "the job is preempted", enforced=True)
    assert of(Evidence(ends(KILL, KILL), enforced))[0] == "preempted"


def test_a_rank_that_fails_while_saving_is_a_failure() -> None:
    stop = StopReason(ExitClass.TIME_LIMIT, "the end is near")
    failing = [RankEnd(0, 85, "a"), RankEnd(1, 1, "a", message="disk full")]
    assert of(Evidence(failing, stop))[:2] == ("crash", 1)


CODES = st.one_of(st.none(), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 85, KILL, TERM, SEGV, 17]))
RANK_ENDS = st.lists(st.tuples(CODES, st.sampled_from(["a", "b"]), st.booleans()), min_size=1, max_size=6)


@given(
    RANK_ENDS,
    st.sampled_from([None, *(c for c in ExitClass if c in ("interrupted", "preempted", "time_limit", "hang"))]),
    st.sets(st.integers(-1, 5)),
    st.sampled_from([(), ("b",)]),
    st.booleans(),
)
def test_every_evidence_has_a_class(
    raw: list[tuple[int | None, str, bool]],
    stop: ExitClass | None,
    out_of_memory: set[int],
    down: tuple[str, ...],
    enforced: bool,
) -> None:
    own = [RankEnd(rank, code, node, consequence=lost) for rank, (code, node, lost) in enumerate(raw)]
    reason = None if stop is None else StopReason(stop, "asked", enforced=enforced)
    verdict = classify(Evidence(own, reason, frozenset(), down, frozenset(out_of_memory)))
    assert verdict.reason
    codes = {end.code for end in own}
    assert (verdict.exit_class == ExitClass.FINISHED) == (codes == {0})
    if stop is None and not codes & {None, 0, 85}:
        assert verdict.exit_class not in (ExitClass.INTERRUPTED, ExitClass.PREEMPTED, ExitClass.TIME_LIMIT)
    if verdict.exit_class in (ExitClass.INTERRUPTED, ExitClass.PREEMPTED, ExitClass.TIME_LIMIT):
        assert stop == verdict.exit_class or (stop is None and codes <= {0, 85})


def test_end_records_are_read_by_rank_and_damage_is_passed_over(run: RunDir) -> None:
    run.attempt_path(1).mkdir(parents=True)
    write_end_record(run, 1, 3, 5, "nonfinite", "step 7", consequence=False)
    write_end_record(run, 1, 0, 1, "crash", LOST, consequence=True)
    run.end_record_path(1, 2).write_text("{torn")
    found = read_end_records(run, 1)
    assert list(found) == [0, 3]
    assert (found[3].code, found[3].message, found[3].consequence) == (5, "step 7", False)
    assert found[0].consequence
    assert read_end_records(run, 9) == {}
    write_end_record(run, 9, 0, 1, "crash", "nowhere to write")  # never raises


def test_kills_for_memory_are_counted_where_the_kernel_tells(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 1\noom_kill 9\n")
    assert oom_kills(tmp_path) == OomKills(9, anyone_s=True)
    group = tmp_path / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills(tmp_path) == OomKills(2)
