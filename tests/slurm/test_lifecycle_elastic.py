"""Layouts for fewer nodes, their revisions, the guardian of the batch host, and the way back into the queue."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from support.small_text import small_run

from launchers.lease import Lease
from launchers.lifecycle.exit_class import ExitClass, Verdict
from launchers.lifecycle.journal import append, read_journal
from launchers.lifecycle.policy import Decision
from launchers.lifecycle.supervise import Outcome
from launchers.run_dir import RunDir
from launchers.slurm import elastic, guardian, job
from launchers.slurm.commands import JobInfo, NodeInfo, PartitionInfo, Slurm, SlurmError
from launchers.slurm.start import Allocation
from pretrain.config.check import check
from pretrain.config.compose import load_run_config
from pretrain.config.schema import Config


@pytest.fixture
def made(data_path: Path, tmp_path: Path) -> tuple[RunDir, Config]:
    """A run for four nodes with one rank each and a global batch of four."""
    tree, _ = load_run_config(
        [
            *small_run(data_path),
            "launcher=slurm",
            "launcher.num_nodes=4",
            "launcher.num_processes=4",
            "launcher.min_nodes=1",
            "train.micro_batch_size=1",
        ]
    )
    return RunDir.create(tree, path=tmp_path / "run"), check(tree)


def test_the_largest_layout_that_divides_the_batch_is_taken_and_grows_again(made: tuple[RunDir, Config]) -> None:
    run, config = made
    assert elastic.adapt(run, config, 4) is config
    # Three ranks do not divide a global batch of four.
    smaller = elastic.adapt(run, config, 3)
    assert smaller is not None
    assert elastic.layout_of(smaller) == elastic.Layout(2, 2)
    assert smaller.train == config.train
    assert elastic.layout_of(check(run.config())) == elastic.Layout(2, 2)
    entry = read_journal(run)[-1]
    assert (entry["event"], entry["revision"], entry["full_nodes"]) == ("resized", 1, 4)
    assert elastic.layout_of(elastic.at_full_size(run, smaller)) == elastic.Layout(4, 4)
    again = elastic.adapt(run, smaller, 4)
    assert again is not None
    assert elastic.layout_of(again) == elastic.Layout(4, 4)
    assert run.revision() == 2


def test_not_below_what_the_user_allows(made: tuple[RunDir, Config]) -> None:
    run, _ = made
    tree, full = run.config(), elastic.Layout(4, 4)
    assert elastic.fit(tree, full, 2, 1) is None
    assert elastic.fit(tree, full, None, 3) is None  # never with fewer
    assert elastic.fit(tree, full, 1, 0) is None
    assert elastic.fit(tree, full, 1, 9) == full


def test_a_user_s_own_change_of_size_is_the_new_full_size(made: tuple[RunDir, Config]) -> None:
    run, config = made
    assert elastic.adapt(run, config, 2) is not None
    changed = elastic.resized(run.config(), elastic.Layout(1, 1))
    run.add_revision(changed, ["launcher.num_nodes: 2 -> 1"])
    assert elastic.full_layout(run, check(changed)) == elastic.Layout(1, 1)


class FakeSlurm:
    """A controller with one job that remembers what was asked of it."""

    def __init__(self, host: str = "IDLE", refuses: tuple[str, ...] = ()) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.host = host
        self.refuses = refuses
        self.pending = False

    def nodes(self, names: Sequence[str] = ("n1", "n2", "n3")) -> dict[str, NodeInfo]:
        return {name: NodeInfo(name, frozenset([self.host]), "", "", "", 1, 1, "") for name in names}

    def partitions(self) -> dict[str, PartitionInfo]:
        return {}

    def job(self, number: int) -> JobInfo:
        return JobInfo(number, "PENDING" if self.pending else "RUNNING", "None")

    def requeue(self, number: int) -> None:
        self._act("requeue", number)
        self.pending = True

    def update_excluded(self, number: int, nodes: set[str]) -> None:
        self._act("exclude", number, *sorted(nodes))

    def _act(self, *words: Any) -> None:
        self.asked.append(words)
        if words[0] in self.refuses:
            raise SlurmError(f"{words[0]}: not allowed here")


def test_the_guardian_acts_only_for_a_dead_host_of_its_own_attempt(
    made: tuple[RunDir, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = made
    monkeypatch.setattr(guardian, "INTERVAL_S", 0.01)
    monkeypatch.setattr(guardian, "SILENCE_S", 0.05)
    dead, alive = FakeSlurm(host="DOWN"), FakeSlurm()
    with Lease.acquire(run) as lease:
        assert guardian.watch(run, lease.attempt, 7, "n1", cast(Slurm, dead))
        assert dead.asked == [("requeue", 7)]
        record = json.loads(run.lease_path.read_text())
        monkeypatch.setattr(guardian.time, "sleep", lambda _: run.lease_path.write_text(json.dumps(later)))
        later = record | {"attempt": lease.attempt + 1}
        assert not guardian.watch(run, lease.attempt, 7, "n1", cast(Slurm, alive))
    assert alive.asked == []


def test_the_guardian_outlives_its_supervisor_s_leaving(
    made: tuple[RunDir, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = made
    (tmp_path / "srun").write_text(f"#!/bin/sh\nwhile [ ! -e {tmp_path}/over ]; do sleep 0.05; done\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run.attempt_path(1).mkdir(parents=True)
    with guardian.guarded(run, config, 1, JOB):
        (process,) = guardian._started
    assert process.poll() is None
    (tmp_path / "over").touch()
    assert process.wait(30) == 0


JOB = Allocation(7, ("n1", "n2"), (1, 1), "n1")


def blame(run: RunDir, node: str) -> None:
    append(run, "attempt_ended", attempt=1, exit_class="node_failure", action="exclude", exclude=[node])


def outcome(action: Any = "exclude", excluded: tuple[str, ...] = ("n2",)) -> Outcome:
    verdict = Verdict(ExitClass.NODE_FAILURE, "node n2 is down", node="n2")
    return Outcome(1, verdict, Decision(action, False, excluded, "node n2 is down"), enforced=True)


def test_back_to_the_queue_without_the_node(made: tuple[RunDir, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = made
    blame(run, "n2")
    monkeypatch.setattr(job, "_wait_for_the_end", lambda: None)
    slurm = FakeSlurm()
    assert job._back_to_queue(run, config, cast(Slurm, slurm), JOB, outcome()) == 85
    assert slurm.asked == [("requeue", 7), ("exclude", 7, "n2")]
    entry = read_journal(run)[-1]
    assert (entry["event"], entry["job"], entry["exclude"]) == ("requeued", 7, ["n2"])
    # Slurm has put it back itself, as in a preemption: it is not asked again.
    assert job._back_to_queue(run, config, cast(Slurm, slurm), JOB, outcome("requeue", ())) == 85
    assert slurm.asked[2:] == [("exclude", 7, "n2")]


def test_where_requeueing_is_refused_a_new_job_is_submitted(
    made: tuple[RunDir, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = made
    blame(run, "n2")
    submitted: list[Any] = []
    monkeypatch.setattr(job, "submit", lambda *words, **_: submitted.append(words[1:]) or 8)
    slurm = FakeSlurm(refuses=("requeue",))
    assert job._back_to_queue(run, config, cast(Slurm, slurm), JOB, outcome()) == 0
    assert submitted == [(config, "chain", ["n2"])]


def test_a_run_that_cannot_be_queued_says_so(
    made: tuple[RunDir, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = made

    def refuse(*_: Any, **__: Any) -> int:
        raise SlurmError("Requested node configuration is not available")

    monkeypatch.setattr(job, "submit", refuse)
    slurm = FakeSlurm(refuses=("requeue",))
    assert job._back_to_queue(run, config, cast(Slurm, slurm), JOB, outcome()) == 1
    assert read_journal(run)[-1]["event"] == "requeue_failed"
    assert f"pretrain resume {run.path}" in capsys.readouterr().err
