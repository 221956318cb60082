"""Hangs of real processes joined by gloo: who is named, with which stack and which collective."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers.hang import Hang, Watch
from launchers.hang_report import main_stack, write_report
from launchers.run_dir import RunDir
from pretrain.config.schema import Config, LifecycleConfig, LocalConfig

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
Start = Callable[[str, int], tuple[list[subprocess.Popen[bytes]], Watch]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create({"run": {"name": "demo"}}, path=tmp_path / "run")


@pytest.fixture
def start(run: RunDir) -> Iterator[Start]:
    """Ranks of ``support/hanging_rank.py`` with a behaviour, and a watch over them."""
    started: list[subprocess.Popen[bytes]] = []

    def call(behaviour: str, size: int) -> tuple[list[subprocess.Popen[bytes]], Watch]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        for rank in range(size):
            program = [ROOT / "tests/support/hanging_rank.py", run.path, port, rank, size, behaviour]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen([sys.executable, *map(str, program)], env=environment))
        lifecycle = LifecycleConfig(heartbeat_interval_s=0.3, hang_timeout_s=2.5, startup_timeout_s=90.0)
        config = Config(lifecycle=lifecycle, launcher=LocalConfig(num_processes=size))
        return started, Watch(run, 1, config)

    yield call
    for process in started:
        process.kill()
        process.wait()


def found(watch: Watch) -> Hang:
    deadline = time.monotonic() + 120
    while (hang := watch.poll()) is None:
        assert time.monotonic() < deadline, f"no hang was found; heartbeats {watch.beats()}"
        time.sleep(0.1)
    return hang


def report(run: RunDir, hang: Hang, processes: list[subprocess.Popen[bytes]]) -> str:
    def ask() -> None:
        for process in processes:
            process.send_signal(signal.SIGQUIT)

    path = write_report(run, 1, hang, ask_for_stacks=ask)
    assert path == run.path / "reports" / "hang_attempt_0001.md"
    return path.read_text(encoding="utf-8")


def test_a_loop_in_python_is_named_with_its_line(run: RunDir, start: Start) -> None:
    processes, watch = start("loop", 3)
    hang = found(watch)
    assert (hang.rank, hang.culprits, hang.node, hang.phase, hang.step) == (1, [1], "node2", "forward", 2)
    assert "ranks 0, 2 wait in all_reduce no. 3 of gloo default" in hang.reason
    assert hang.collective is not None
    assert (hang.collective.name, hang.collective.count, hang.collective.running) == ("all_reduce", 2, False)
    page = report(run, hang, processes)
    assert "Culprit: rank 1 on node2, in phase forward after step 2" in page
    assert "misbehave" in main_stack(run.stacks_path(1, 1))[0]
    assert "in misbehave" in page
    assert "gloo:all_reduce no. 3 [[3]] running" in page, page
    assert len(page.splitlines()) < 80, "one page"
    assert all(process.poll() is None for process in processes), "asking for stacks ended a rank"


def test_a_rank_that_never_joins_is_named_and_when_frozen_told_to_be_silent(run: RunDir, start: Start) -> None:
    processes, watch = start("wait", 2)
    hang = found(watch)
    assert (hang.rank, hang.phase, hang.silent) == (1, "data", [])
    page = report(run, hang, processes)
    assert "threading.py" in page
    assert "which waits, stands" in page
    processes[1].send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not watch.silent():
        watch.poll()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    hang = found(watch)
    assert (hang.rank, hang.node, hang.silent) == (1, "node2", [1])
    page = write_report(run, 1, hang, ask_for_stacks=lambda: None, wait_s=0.5).read_text(encoding="utf-8")
    assert "No stack: the process is dead or frozen" in page


def test_a_wait_that_the_flight_recorder_does_not_know_is_seen_in_the_stack(run: RunDir, start: Start) -> None:
    _, watch = start("no sender", 2)
    hang = found(watch)
    assert (hang.rank, hang.phase) == (1, "data")
    assert "is in no collective while rank 0 waits in recv" in hang.reason
    assert "threading.py" in hang.beats[1].where


def test_ranks_in_different_collectives_are_told_apart(run: RunDir, start: Start) -> None:
    processes, watch = start("other collective", 3)
    hang = found(watch)
    assert hang.rank == 1
    assert "the ranks' programs have gone different ways" in hang.reason
    assert "all_reduce no. 3 of gloo default" in hang.reason
    assert "in all_reduce no. 1 of gloo group" in report(run, hang, processes)


def test_a_rank_that_holds_the_interpreter_falls_silent_and_still_gives_its_stack(run: RunDir, start: Start) -> None:
    processes, watch = start("hold interpreter", 2)
    hang = found(watch)
    assert (hang.rank, hang.silent) == (1, [1])
    assert "stuck in a call that holds Python's interpreter" in hang.reason
    report(run, hang, processes)
    deadline = time.monotonic() + 30
    while not main_stack(run.stacks_path(1, 1)):
        assert time.monotonic() < deadline, "the handler of SIGQUIT needs no interpreter"
        time.sleep(0.1)
    assert "misbehave" in main_stack(run.stacks_path(1, 1))[0]
