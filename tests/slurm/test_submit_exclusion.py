"""Nodes that a run is kept away from: for how long, and never so that it could not start any more."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launchers.lifecycle.exclusions import excluded_nodes, exclusions
from launchers.lifecycle.journal import append, read_journal
from launchers.run_dir import RunDir
from launchers.slurm.commands import JobInfo, NodeInfo, PartitionInfo, Slurm, SlurmError
from launchers.slurm.exclusion import readmit, settle
from launchers.slurm.start import Allocation
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.schema import Config

DAY = 24 * 3600.0


class Cluster:
    """A controller with nodes n1 to n4 in one partition; ``states`` and ``started`` (of slurmd) by node."""

    def __init__(self, states: dict[str, str] | None = None, started: dict[str, float] | None = None) -> None:
        self.states = dict.fromkeys(("n1", "n2", "n3", "n4"), "IDLE") | (states or {})
        self.started = started or {}

    def nodes(self) -> dict[str, NodeInfo]:
        return {
            name: NodeInfo(name, frozenset([state]), "", "", "", 1, 1, "", self.started.get(name))
            for name, state in self.states.items()
        }

    def partitions(self) -> dict[str, PartitionInfo]:
        return {"low": PartitionInfo("low", "UP", True, tuple(self.states), None, None, None, None, None, None)}

    def job(self, job: int) -> JobInfo:
        return JobInfo(job, "RUNNING", "", partition="low")

    def expand(self, names: str) -> tuple[str, ...]:
        return (names,)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create({"run": {"name": "demo"}}, path=tmp_path / "run")


def config(num_nodes: int = 2, min_nodes: int | None = None, own: tuple[str, ...] = ()) -> Config:
    launcher = SlurmConfig(num_processes=num_nodes, num_nodes=num_nodes, min_nodes=min_nodes)
    return cast(Config, SimpleNamespace(launcher=launcher, cluster=ClusterConfig(exclude=list(own))))


def blame(run: RunDir, *nodes: str) -> None:
    append(run, "attempt_ended", attempt=1, exit_class="node_failure", action="exclude", exclude=list(nodes))


@pytest.mark.parametrize(
    ("num_nodes", "min_nodes", "own", "states", "expected"),
    [
        (2, None, (), {}, ["n2"]),
        (3, None, (), {}, ["n2"]),
        (4, None, (), {}, []),
        (4, 3, (), {}, ["n2"]),
        (3, None, ("n4",), {}, []),  # the user's own exclusion counts, too
        (3, None, (), {"n3": "DOWN"}, []),  # as does what nobody can use
        (3, None, (), {"n3": "ALLOCATED"}, ["n2"]),
    ],
)
def test_enough_nodes_remain(
    run: RunDir,
    num_nodes: int,
    min_nodes: int | None,
    own: tuple[str, ...],
    states: dict[str, str],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    blame(run, "n2")
    assert settle(run, config(num_nodes, min_nodes, own), cast(Slurm, Cluster(states)), 7) == expected
    assert excluded_nodes(read_journal(run)) == set(expected)  # the supervisor of the next life goes by this
    assert ("no longer kept away from n2" in capsys.readouterr().err) == (not expected)


def test_a_node_that_was_started_again_is_taken_again(run: RunDir) -> None:
    blame(run, "n2", "n3")
    later = time.time() + 60
    assert settle(run, config(), cast(Slurm, Cluster(started={"n2": later, "n3": later - 120})), 7) == ["n3"]
    blame(run, "n2")  # once more
    assert excluded_nodes(read_journal(run)) == {"n2", "n3"}


def test_all_stay_out_while_slurm_does_not_answer(run: RunDir) -> None:
    class Silent(Cluster):
        def partitions(self) -> dict[str, PartitionInfo]:
            raise SlurmError("no answer", transient=True)

    blame(run, "n2")
    assert settle(run, config(4), cast(Slurm, Silent()), 7) == ["n2"]


def test_an_exclusion_ends_after_a_day_however_often_it_was_carried_on() -> None:
    def entry(at: float, event: str, **more: Any) -> dict[str, Any]:
        return {"time": at, "event": event, **more}

    history = [
        entry(0.0, "submitted", kind="first", exclude=["mine"]),
        entry(1.0, "attempt_ended", exclude=["a"]),
        entry(DAY / 2, "requeued", exclude=["a"]),
        entry(DAY / 2, "attempt_ended", exclude=["b"]),
        entry(DAY / 2, "submitted", kind="chain", exclude=["a", "b"]),
    ]
    assert set(exclusions(history, DAY)) == {"mine", "a", "b"}
    assert set(exclusions(history, DAY + 2)) == {"mine", "b"}


def test_a_life_takes_nodes_that_slurm_gave_it_all_the_same(run: RunDir) -> None:
    blame(run, "n2")
    readmit(run, config(1), Allocation(7, ("n1", "n2"), (1, 1), "n1"))  # it can do without
    assert excluded_nodes(read_journal(run)) == {"n2"}
    readmit(run, config(2), Allocation(7, ("n1", "n2"), (1, 1), "n1"))
    assert excluded_nodes(read_journal(run)) == set()
