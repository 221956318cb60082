"""The heartbeat's thread in a small process without torch: what it tells, and what signals do to it and to helpers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers.heartbeat import Heartbeat, read_heartbeats
from launchers.run_dir import RunDir
from pretrain.parallel.pulse import Pulse
from pretrain.training.flight import last_collective
from pretrain.training.heartbeat import Place

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, sys, threading, time
from pathlib import Path
from launchers.run_dir import RunDir
from pretrain.parallel.pulse import PULSE
from pretrain.training.heartbeat import Heart, Place
from pretrain.training.signals import StopRequest

stop = StopRequest()
stop.install()
heart = Heart(RunDir(Path(sys.argv[1])), Place(0, 1, "n7"), stop)
heart.interval_s = 0.2
PULSE.enter("start", "reading")
heart.start()
BODY
"""


def program(run: RunDir, body: str) -> subprocess.Popen[bytes]:
    text = PROGRAM.replace("BODY", body)
    return subprocess.Popen([sys.executable, "-c", text, str(run.path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})


def until(run: RunDir, condition: Callable[[Heartbeat], Any]) -> Heartbeat:
    deadline = time.monotonic() + 60
    while True:
        beats = read_heartbeats(run, 1)
        if beats and condition(beats[0]):
            return beats[0]
        assert time.monotonic() < deadline, beats
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create({"run": {"name": "demo"}}, path=tmp_path / "run")


def test_it_tells_phases_steps_and_a_stop_request(run: RunDir) -> None:
    process = program(
        run,
        """
PULSE.enter("forward")
PULSE.completed(41)
while not stop.requested: time.sleep(0.01)
PULSE.enter("save")
time.sleep(0.5)
heart.close()
""",
    )
    beat = until(run, lambda told: told.phase == "forward")
    assert (beat.rank, beat.node, beat.pid, beat.stopping) == (0, "n7", process.pid, None)
    later = until(run, lambda told: told.step == 41 and told.where)
    assert (later.steps, later.collective) == (1, None)
    process.send_signal(signal.SIGUSR2)
    until(run, lambda told: told.phase == "save" and told.stopping == "SIGUSR2")
    assert process.wait(timeout=60) == 0
    last = read_heartbeats(run, 1)[0]
    assert (last.phase, last.detail) == ("stop", "after save")
    assert last.progress > later.progress > 0


def test_a_process_stuck_at_start_leaves_when_asked_and_says_that_it_is_resumable(run: RunDir) -> None:
    process = program(run, "threading.Event().wait()")
    until(run, lambda told: told.detail == "reading")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 85


def test_a_helper_ignores_what_is_meant_for_ranks_and_can_be_ended(run: RunDir) -> None:
    process = program(
        run,
        """
PULSE.enter("data")
child = os.fork()
if child == 0:
    Path(sys.argv[1], "ready").touch()
    while True: time.sleep(0.01)
Path(sys.argv[1], "child").write_text(str(child))
_, status = os.waitpid(child, 0)
assert not stop.requested
Path(sys.argv[1], "status").write_text(str(os.waitstatus_to_exitcode(status)))
heart.close()
""",
    )
    until(run, lambda told: (run.path / "ready").exists() and (run.path / "child").exists())
    child = int((run.path / "child").read_text())
    os.kill(child, signal.SIGUSR1)
    os.kill(child, signal.SIGUSR2)
    os.kill(child, signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert (run.path / "status").read_text() == str(-signal.SIGTERM)
    assert read_heartbeats(run, 1)[0].stopping is None


def test_a_full_or_lost_file_system_does_not_end_the_rank(run: RunDir) -> None:
    process = program(
        run,
        """
import shutil
PULSE.enter("data")
shutil.rmtree(sys.argv[1] + "/heartbeats")
time.sleep(0.6)
heart.close()
""",
    )
    assert process.wait(timeout=60) == 0


def test_the_place_of_a_rank_under_srun_and_torchrun() -> None:
    assert Place.read({}) is None
    slurm = {"SLURM_PROCID": "3", "PRETRAIN_ATTEMPT": "2", "SLURMD_NODENAME": "n4"}
    assert Place.read(slurm) == Place(3, 2, "n4")
    assert Place.read(slurm | {"TORCHELASTIC_RUN_ID": "x", "RANK": "9"}) == Place(9, 2, "n4")


def test_a_phase_inside_another_comes_back_and_stays_when_it_fails() -> None:
    pulse = Pulse()
    pulse.enter("data", "first")
    with pulse.during("save"):
        assert pulse.phase == "save"
    assert (pulse.phase, pulse.detail) == ("data", "first")
    with pytest.raises(OSError, match="full"), pulse.during("save"):
        raise OSError("full")
    assert pulse.phase == "save"


def test_the_oldest_unfinished_collective_is_what_holds_a_rank_up() -> None:
    def entry(group: str, number: int, at: int, **more: Any) -> dict[str, Any]:
        return {
            "profiling_name": "nccl:all_gather", "process_group": [group, "default_pg" if group == "0" else "dp"],
            "collective_seq_id": number, "time_created_ns": at * 10**9, "state": "completed", "retired": True, **more,
        }  # fmt: skip

    waiting = {"state": "started", "retired": False}
    entries = [entry("0", 5, 10), entry("0", 7, 30, **waiting), entry("0", 6, 20, **waiting), entry("0", 4, 5)]
    collective, counts = last_collective({"entries": entries})
    assert collective is not None
    assert (collective.name, collective.count, collective.running, collective.since) == ("all_gather", 6, True, 20.0)
    assert counts == {"nccl default": 7}
    transfer = entry("0", 0, 40, is_p2p=True, p2p_seq_id=3, profiling_name="nccl:recv 0<-1", **waiting)
    collective, counts = last_collective({"entries": [entries[0], transfer]})
    assert collective is not None
    assert (collective.name, collective.count) == ("recv 0<-1", 3)
    assert counts == {"nccl default": 5, "nccl default (transfers)": 3}
    assert last_collective(None) == (None, {})
