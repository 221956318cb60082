"""The lease: one winner of a race, takeover of the dead, patience with the distant, fencing of the displaced."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from launchers import lease as lease_module
from launchers.lease import FencedError, Lease, LeaseHeldError, check_attempt, current_holder
from launchers.run_dir import RunDir, atomic_write_text

_HOLD = """
import sys, time
from launchers.lease import Lease
from launchers.run_dir import RunDir
held = Lease.acquire(RunDir.open(sys.argv[1]))
print(held.attempt, flush=True)
time.sleep(600)
"""


def _holder_process(run: RunDir) -> subprocess.Popen[str]:
    root = Path(lease_module.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run.path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    return process


def _contend(path: str, ready: Any, go: Event, done: Event, results: Any) -> None:
    run = RunDir.open(path)
    ready.release()
    go.wait()
    try:
        held = Lease.acquire(run)
    except LeaseHeldError:
        results.put(None)
        return
    results.put(held.attempt)
    done.wait()


def test_of_many_contenders_exactly_one_wins(run: RunDir) -> None:
    # The last holder is dead, so that every contender starts by finding the lease free.
    dead = _holder_process(run)
    dead.kill()
    dead.wait()
    context = multiprocessing.get_context("fork")
    ready, go, done, results = context.Semaphore(0), context.Event(), context.Event(), context.Queue()
    contenders = [context.Process(target=_contend, args=(str(run.path), ready, go, done, results)) for _ in range(12)]
    for process in contenders:
        process.start()
    for _ in contenders:
        ready.acquire()
    go.set()
    outcomes = [results.get(timeout=60) for _ in contenders]
    done.set()
    for process in contenders:
        process.join()
    assert [outcome for outcome in outcomes if outcome is not None] == [2]
    assert not list(run.logs_path.glob(".claim-*"))


def test_attempt_numbers_grow_and_survive_release(run: RunDir) -> None:
    for number in (1, 2, 3):
        with Lease.acquire(run) as held:
            assert held.attempt == number
            check_attempt(run, number)
    holder = current_holder(run)
    assert holder is not None
    assert (holder.attempt, holder.released) == (3, True)


def test_a_living_holder_is_named_and_respected(run: RunDir) -> None:
    process = _holder_process(run)
    try:
        with pytest.raises(LeaseHeldError, match=f"held by process {process.pid}") as caught:
            # However old its heartbeat: it is seen to live.
            Lease.acquire(run, stale_after_s=-1)
        assert f"kill {process.pid}" in str(caught.value)
    finally:
        process.kill()
        process.wait()


def test_a_dead_holder_on_this_machine_is_taken_over_at_once(run: RunDir) -> None:
    process = _holder_process(run)
    os.kill(process.pid, signal.SIGKILL)
    # Not yet reaped: a zombie is dead.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Lease.acquire(run) as held:
        assert held.attempt == 2
    process.wait()


def test_a_reused_pid_does_not_keep_the_lease(run: RunDir) -> None:
    with Lease.acquire(run):
        record = json.loads(run.lease_path.read_text())
    record |= {"released": False, "process_start": "1"}
    run.lease_path.write_text(json.dumps(record))
    with Lease.acquire(run) as held:
        assert held.attempt == 2


def test_a_distant_holder_is_taken_over_only_when_silent(run: RunDir) -> None:
    with Lease.acquire(run):
        record = json.loads(run.lease_path.read_text())
    record |= {"released": False, "host": "far", "machine": "far", "heartbeat": time.time() - 60}
    run.lease_path.write_text(json.dumps(record))
    with pytest.raises(LeaseHeldError, match="on far since"):
        Lease.acquire(run, stale_after_s=120)
    with Lease.acquire(run, stale_after_s=30, watch_s=0.1) as held:
        assert held.attempt == 2
        with pytest.raises(FencedError, match="attempt 1 lost this run directory to attempt 2"):
            check_attempt(run, 1)


def test_a_distant_holder_whose_clock_is_wrong_is_seen_to_live(run: RunDir) -> None:
    with Lease.acquire(run):
        record = json.loads(run.lease_path.read_text())
    record |= {"released": False, "host": "far", "machine": "far"}
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.01):
            # Written as a holder does, by a clock that is an hour behind.
            atomic_write_text(run.lease_path, json.dumps(record | {"heartbeat": time.time() - 3600}))

    atomic_write_text(run.lease_path, json.dumps(record | {"heartbeat": time.time() - 3600}))
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LeaseHeldError, match=r"gives signs of life though its clock is 36\d\d s away"):
            Lease.acquire(run, watch_s=60)
    finally:
        over.set()
        beating.join()


def test_a_claim_whose_maker_died_before_its_first_heartbeat_uses_up_its_number(run: RunDir) -> None:
    process = _holder_process(run)
    process.kill()
    process.wait()
    run.lease_path.unlink()
    with Lease.acquire(run) as held:
        assert held.attempt == 2


def test_a_fenced_holder_notices_and_never_writes_again(run: RunDir) -> None:
    old = Lease.acquire(run, interval_s=0.01)
    record = json.loads(run.lease_path.read_text())
    stolen = lease_module.Holder(**{**record, "attempt": 2, "host": "thief"})
    assert lease_module._claim(run, stolen)
    assert old.lost.wait(30)
    lease_module.atomic_write_text(run.lease_path, lease_module._to_text(stolen))
    old.release()
    assert json.loads(run.lease_path.read_text())["host"] == "thief"
    with pytest.raises(FencedError):
        check_attempt(run, 1)


def test_the_heartbeat_advances(run: RunDir) -> None:
    with Lease.acquire(run, interval_s=0.01):
        first = json.loads(run.lease_path.read_text())["heartbeat"]
        while json.loads(run.lease_path.read_text())["heartbeat"] == first:
            pass
