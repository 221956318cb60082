"""Reading what srun says of its tasks, and what Slurm means by a signal. Texts are of Slurm 22.05 as printed."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from launchers.lifecycle.exit_class import ExitClass
from launchers.slurm.backend import SlurmBackend, meaning_of, notice_s
from launchers.slurm.commands import JobInfo, NodeInfo, Slurm, SlurmError
from launchers.slurm.start import Allocation
from launchers.slurm.step import SrunRanks, parse_task_ends

SAID = """\
srun: error: node2: task 3: Segmentation fault
srun: error: node1: task 1: Exited with exit code 5
srun: error: node1: task 2: Killed
srun: error: node[1-4]: tasks 4-6,9: Exited with exit code 85
srun: error: node7: task 12: Aborted (core dumped)
srun: error: node8: task 13: Out Of Memory
srun: error: node1: task 1: Terminated
srun: Force Terminated StepId=1.0
srun: error: Node failure on node2
slurmstepd-node1: error: *** STEP 4.1 ON node1 CANCELLED AT 2026-11-22T14:55:34 ***
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
"""


def test_ends_of_tasks_are_read_the_first_word_counts() -> None:
    expected = {1: 5, 2: 137, 3: 139, 12: 134, 13: -1} | dict.fromkeys((4, 5, 6, 9), 85)
    assert parse_task_ends(SAID) == expected
    assert parse_task_ends("") == {}


class FakeSlurm:
    """A controller that does not answer."""

    def step(self, job: int, name: str) -> str | None:
        raise SlurmError("no answer", transient=True)


def start(tmp_path: Path, source: str, **more: Any) -> SrunRanks:
    """A program in the place of srun, for two nodes with two ranks each."""
    command = [sys.executable, "-c", "import signal, sys, time\n" + source]
    return SrunRanks(
        command,
        os.environ,
        tmp_path / "srun.log",
        slurm=cast(Slurm, FakeSlurm()),
        job=7,
        step_name="attempt_0001",
        nodes=["n1", "n2"],
        per_node=2,
        **more,
    )


def follow(ranks: SrunRanks) -> dict[int, tuple[int | None, str | None]]:
    deadline = time.monotonic() + 60
    while ranks.num_running():
        assert time.monotonic() < deadline
        ranks.wait(0.05)
    found = {end.rank: (end.code, end.node) for end in ranks.ends()}
    ranks.close()
    return found


def wait_for_an_end(ranks: SrunRanks) -> None:
    deadline = time.monotonic() + 60
    while not ranks.ends():
        assert time.monotonic() < deadline
        ranks.wait(0.05)


def test_all_tasks_end_well(tmp_path: Path) -> None:
    assert follow(start(tmp_path, "")) == {0: (0, "n1"), 1: (0, "n1"), 2: (0, "n2"), 3: (0, "n2")}


def test_ends_are_known_while_other_tasks_run(tmp_path: Path) -> None:
    source = """
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
print("srun: error: n2: task 3: Killed", flush=True)
while not stopped:
    time.sleep(0.01)
print("srun: error: n1: tasks 0-1: Exited with exit code 85", flush=True)
sys.exit(137)
"""
    ranks = start(tmp_path, source)
    wait_for_an_end(ranks)
    assert [(end.rank, end.code, end.node) for end in ranks.ends()] == [(3, 137, "n2")]
    assert ranks.num_running() == 3
    ranks.ask_to_stop()  # through srun itself: the controller is silent
    # Of rank 2 nothing was said: it left without a trace, or told of its end itself.
    assert follow(ranks) == {0: (85, "n1"), 1: (85, "n1"), 2: (None, "n2"), 3: (137, "n2")}


def test_a_kill_is_not_held_up_by_a_node_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.slurm.step._END_AFTER_S", 0.2)
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("srun: error: n1: task 0: Exited with exit code 1", flush=True)
time.sleep(600)
"""
    ranks = start(tmp_path, source)
    wait_for_an_end(ranks)
    ranks.kill()
    assert ranks.killed == {1, 2, 3}
    assert follow(ranks)[0] == (1, "n1")


def test_out_of_memory_is_heard(tmp_path: Path) -> None:
    ranks = start(tmp_path, "print('srun: error: n1: task 1: Out Of Memory'); sys.exit(1)")
    assert follow(ranks)[1] == (137, "n1")
    assert ranks.out_of_memory() == {1}
    said = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.0. Some of your processes may have been killed"
    other = tmp_path / "other"
    other.mkdir()
    ranks = start(other, f"print({said!r}); print('srun: error: n2: task 2: Killed'); sys.exit(137)")
    follow(ranks)
    assert ranks.out_of_memory() == {-1}


def test_a_killed_agent_takes_its_node_s_ranks_along(tmp_path: Path) -> None:
    ranks = start(tmp_path, "print('srun: error: n2: task 1: Killed'); sys.exit(137)", tasks_are_nodes=True)
    assert follow(ranks) == {0: (None, "n1"), 1: (None, "n1"), 2: (137, "n2"), 3: (137, "n2")}


AGENT_SAYS = """\
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Failures:
[1]:
  time      : 2026-11-22_18:56:44
  rank      : 2 (local_rank: 0)
  exitcode  : 85 (pid: 31023)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_18:56:44
  host      : localhost
  rank      : 3 (local_rank: 1)
  exitcode  : -9 (pid: 31024)  (SIGKILL)
"""


def test_an_agent_tells_of_a_rank_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "torchrun_00001.log").write_text(AGENT_SAYS)
    source = "print('srun: error: n2: task 1: Exited with exit code 1'); sys.exit(1)"
    ranks = start(tmp_path, source, tasks_are_nodes=True)
    # That of rank 2 is in its own record, if it could leave one.
    assert follow(ranks) == {0: (None, "n1"), 1: (None, "n1"), 2: (None, "n2"), 3: (137, "n2")}


RUNNING = JobInfo(7, "RUNNING", "", start_time=1000.0, end_time=5000.0, time_limit_s=4000.0)
ENDING = replace(RUNNING, state="COMPLETING")


@pytest.mark.parametrize(
    ("job", "number", "expected", "enforced"),
    [
        (replace(RUNNING, state="CANCELLED"), signal.SIGTERM, ExitClass.INTERRUPTED, True),
        (replace(RUNNING, preempt_time=1500.0), signal.SIGUSR1, ExitClass.PREEMPTED, False),
        (replace(RUNNING, preempt_time=1500.0), signal.SIGTERM, ExitClass.PREEMPTED, True),
        (replace(RUNNING, preempt_time=1500.0), None, ExitClass.PREEMPTED, False),
        (replace(RUNNING, state="TIMEOUT"), signal.SIGTERM, ExitClass.TIME_LIMIT, True),
        (replace(RUNNING, end_time=1999.0), signal.SIGTERM, ExitClass.TIME_LIMIT, True),
        (replace(RUNNING, state="PENDING"), signal.SIGTERM, ExitClass.PREEMPTED, True),
        # All that ends shows as completing until its processes are gone: scancel, requeue, time limit, failed node.
        (replace(ENDING, end_time=2000.0), signal.SIGTERM, ExitClass.INTERRUPTED, True),
        (replace(ENDING, end_time=2000.0), None, ExitClass.INTERRUPTED, True),
        (replace(ENDING, end_time=None, restarts=1), signal.SIGTERM, ExitClass.PREEMPTED, True),
        (replace(ENDING, end_time=None, restarts=1), None, ExitClass.PREEMPTED, True),
        (replace(ENDING, end_time=2000.0, reason="TimeLimit"), signal.SIGTERM, ExitClass.TIME_LIMIT, True),
        (replace(ENDING, end_time=2000.0, reason="NodeDown"), signal.SIGTERM, ExitClass.NODE_FAILURE, True),
        (replace(ENDING, end_time=2000.0, preempt_time=1990.0), signal.SIGTERM, ExitClass.PREEMPTED, True),
        (replace(RUNNING, state="NODE_FAIL"), signal.SIGTERM, ExitClass.NODE_FAILURE, True),
        (RUNNING, signal.SIGUSR1, ExitClass.PREEMPTED, False),
        (None, signal.SIGTERM, ExitClass.PREEMPTED, True),
    ],
)
def test_what_slurm_means(job: JobInfo | None, number: int | None, expected: ExitClass, enforced: bool) -> None:
    reason = meaning_of(job, number, now=2000.0)
    assert reason is not None
    assert (reason.exit_class, reason.enforced) == (expected, enforced)


def test_what_needs_no_answer_yet() -> None:
    # Nobody asked, and the job goes on: the ranks' ends speak for themselves.
    assert meaning_of(RUNNING, None, now=2000.0) is None
    assert meaning_of(None, None, now=2000.0) is None
    # The notice of the time limit: whoever knows the end waits for the moment itself.
    assert meaning_of(replace(RUNNING, end_time=2100.0), signal.SIGUSR1, now=2000.0, notice_s=60) is None
    # The preemption of an earlier life of the job.
    assert meaning_of(replace(RUNNING, preempt_time=900.0), None, now=2000.0) is None


def test_the_notice_of_the_time_limit_comes_with_the_lead_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    assert notice_s(tmp_path) == 0
    (tmp_path / "slurm" / "job_0001.sbatch").write_text("#SBATCH --signal=B:USR1@60\n")
    (tmp_path / "slurm" / "job_0002.sbatch").write_text("#!/bin/bash\n#SBATCH --signal=B:USR1@125\nexec true\n")
    assert notice_s(tmp_path) == 125
    # Slurm is up to a minute early; the ranks are asked when it is time, not by this.
    job = replace(RUNNING, end_time=2000.0 + 125 + 60)
    assert meaning_of(job, signal.SIGUSR1, now=2000.0, notice_s=125) is None
    assert meaning_of(replace(job, preempt_time=1999.0), signal.SIGUSR1, now=2000.0, notice_s=125) is not None
    early = meaning_of(replace(job, end_time=2400.0), signal.SIGUSR1, now=2000.0, notice_s=125)
    assert early is not None
    assert early.exit_class == ExitClass.PREEMPTED


def test_any_node_that_is_dead_explains_a_vanished_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Silent()
    backend = SlurmBackend(Allocation(7, ("n1",), (1,), "n1"), cast(Slurm, slurm))
    started = {"event": "attempt_started", "attempt": 1, "nodes": ["n1", "n2"], "time": 1000.0}
    for dead, expected, node in (
        ([], ExitClass.PREEMPTED, None),
        (["n1"], ExitClass.NODE_FAILURE, "n1"),
        (["n2"], ExitClass.NODE_FAILURE, "n2"),
    ):
        monkeypatch.setattr("launchers.slurm.backend.dead_nodes", lambda nodes, slurm, dead=dead: dead)
        verdict = backend.vanished(started, last_sign=2000.0)
        assert (verdict.exit_class, verdict.node) == (expected, node)
    # A node is back, by a slurmd that is younger than the last sign of life: none is left out for it.
    monkeypatch.setattr("launchers.slurm.backend.dead_nodes", lambda nodes, slurm: [])
    for begun, expected in ((1500.0, ExitClass.PREEMPTED), (2001.0, ExitClass.NODE_FAILURE)):
        again = NodeInfo("n2", frozenset({"IDLE"}), "", "n2", "n2", 8, 1000, "", slurmd_start=begun)
        monkeypatch.setattr(slurm, "nodes", lambda names, again=again: {"n2": again})
        verdict = backend.vanished(started, last_sign=2000.0)
        assert (verdict.exit_class, verdict.node) == (expected, None)
        assert ("n2" in verdict.reason) == (expected == ExitClass.NODE_FAILURE)


class Silent:
    """A controller without an answer to anything."""

    def config(self) -> dict[str, str]:
        raise SlurmError("no answer", transient=True)

    def nodes(self, names: Any) -> Any:
        raise SlurmError("no answer", transient=True)


def test_a_command_that_was_killed_may_work_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nkill -TERM $$\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SlurmError, match="was ended by SIGTERM") as caught:
        Slurm().nodes(["n1"])
    assert caught.value.transient


def test_a_life_after_others_can_be_cancelled_too() -> None:
    job = replace(ENDING, end_time=2000.0, restarts=2)
    reason = meaning_of(job, signal.SIGTERM, now=2000.0, life=2)
    assert reason is not None
    assert reason.exit_class == ExitClass.INTERRUPTED
    reason = meaning_of(job, signal.SIGTERM, now=2000.0, life=1)
    assert reason is not None
    assert reason.exit_class == ExitClass.PREEMPTED


def test_a_command_that_the_end_of_the_job_struck_is_tried_again() -> None:
    class Struck:
        answers: ClassVar[list[JobInfo]] = [replace(ENDING, end_time=2000.0)]
        asked = 0

        def config(self) -> dict[str, str]:
            return {"KillWait": "30 sec"}

        def job(self, job: int) -> JobInfo:
            self.asked += 1
            if self.asked < 3:
                raise SlurmError("`scontrol` ended with code -15")
            return self.answers[0]

    backend = SlurmBackend(Allocation(7, ("n1",), (1,), "n1"), cast(Slurm, Struck()))
    reason = backend.reason_of(signal.SIGTERM)
    assert reason is not None
    assert reason.exit_class == ExitClass.INTERRUPTED
