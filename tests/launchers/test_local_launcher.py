"""The local launcher with small programs as ranks: environment, exit codes, signals, and no survivors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.launching import launch

import launchers.local
from launchers.exit_codes import ExitCode, from_returncode, meaning
from launchers.lifecycle.evidence import describe_failure
from launchers.local import rank_environment
from launchers.run_dir import RunDir

ROOT = Path(launchers.local.__file__).parents[1]


def _ranks(source: str) -> list[str]:
    return [sys.executable, "-c", "import os, signal, sys, time\nRANK = os.environ['SLURM_PROCID']\n" + source]


def test_ranks_get_the_environment_of_srun(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("WORLD_SIZE", "9")
    source = f"import json; json.dump(dict(os.environ), open(r'{run.path}/' + RANK, 'w'))"
    assert launch(run, attempt=3, num_processes=2, threads_per_process=2, command=_ranks(source)) == 0
    first, second = (json.loads((run.path / str(rank)).read_text()) for rank in (0, 1))
    slurm = {name: value for name, value in second.items() if name.startswith("SLURM_")}
    assert slurm == {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    assert second["PRETRAIN_ATTEMPT"] == "3"
    assert second["OMP_NUM_THREADS"] == "2"
    assert second["MASTER_ADDR"] == "127.0.0.1"
    assert "WORLD_SIZE" not in second
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_the_reserved_port_can_be_bound_by_a_rank_with_reuseaddr_alone(run: RunDir) -> None:
    # The rendezvous store of torch binds in this way on every address.
    source = """
import socket
port = int(os.environ["MASTER_PORT"])
if RANK == "0":
    with socket.socket() as plain:
        try:
            plain.bind(("127.0.0.1", port))
            sys.exit("the port is not reserved")
        except OSError:
            pass
    with socket.create_server(("", port)):
        pass
"""
    assert launch(run, attempt=1, num_processes=2, command=_ranks(source)) == 0


def test_cores_are_shared_when_threads_are_not_given(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.local.usable_cpus", lambda: 7)
    source = "assert os.environ['OMP_NUM_THREADS'] == '3', os.environ['OMP_NUM_THREADS']"
    assert launch(run, attempt=1, num_processes=2, command=_ranks(source)) == 0


@pytest.mark.parametrize("code", [1, 2, 3, 4, 85])
def test_exit_codes_reach_the_caller_unchanged(run: RunDir, code: int) -> None:
    source = f"sys.exit({code} if RANK == '1' else 0)"
    assert launch(run, attempt=1, num_processes=2, command=_ranks(source)) == code


def test_a_dead_rank_takes_the_others_down(run: RunDir) -> None:
    source = """
if RANK == "1":
    print("out of luck", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(600)
"""
    code = launch(run, attempt=1, num_processes=2, command=_ranks(source))
    assert code == 128 + signal.SIGSEGV
    shown = describe_failure(1, code, run.rank_log_path(1, 1))
    assert "rank 1 ended with code 139 (killed by SIGSEGV)" in shown
    assert "| out of luck" in shown
    assert str(run.path / "logs" / "attempt_0001" / "rank_00001.log") in shown


def test_a_rank_that_ignores_the_request_is_killed_after_the_grace(run: RunDir) -> None:
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.path.join(sys.argv[1], "ready" + RANK), "w").close()
if RANK == "0":
    while not os.path.exists(os.path.join(sys.argv[1], "ready1")):
        time.sleep(0.01)
    sys.exit(7)
time.sleep(600)
"""
    command = [*_ranks(source), str(run.path)]
    assert launch(run, attempt=1, num_processes=2, shutdown_grace_s=0.2, command=command) == 7


def test_a_resumable_end_of_one_rank_does_not_signal_those_still_saving(run: RunDir) -> None:
    source = """
def fail(*_):
    open(os.path.join(sys.argv[1], "signalled"), "w").close()
signal.signal(signal.SIGTERM, fail)
if RANK == "0":
    sys.exit(85)
deadline = time.monotonic() + 1
while time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(85)
"""
    assert launch(run, attempt=1, num_processes=2, command=[*_ranks(source), str(run.path)]) == 85
    assert not (run.path / "signalled").exists()


_LAUNCHER = """
import sys
from launchers.run_dir import RunDir
from support.launching import launch
sys.exit(launch(RunDir.open(sys.argv[1]), attempt=1, num_processes=2, shutdown_grace_s=600, command=sys.argv[2:]))
"""


def _start_launcher(run: RunDir, source: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher process whose ranks have said ``ready PID`` in their logs."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, str(run.path), *_ranks(source)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    pids: list[int] = []
    while len(pids) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        logs = [run.rank_log_path(1, rank) for rank in (0, 1)]
        words = [log.read_text().split() for log in logs if log.exists()]
        pids = [int(w[1]) for w in words if len(w) > 1 and w[0] == "ready"]
        time.sleep(0.02)
    return process, pids


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_as_sigterm(run: RunDir, sent: signal.Signals) -> None:
    source = """
count = 0
def stop(number, frame):
    global count
    count += 1
    assert number == signal.SIGTERM
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: os._exit(9))
print("ready", os.getpid(), flush=True)
while not count:
    time.sleep(0.01)
time.sleep(0.6)
sys.exit(85 if count == 1 else 1)
"""
    process, _ = _start_launcher(run, source)
    process.send_signal(sent)
    assert process.wait(60) == ExitCode.RESUMABLE


def test_a_second_signal_kills(run: RunDir) -> None:
    source = """
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("ready", os.getpid(), flush=True)
while True:
    time.sleep(600)
"""
    process, pids = _start_launcher(run, source)
    process.send_signal(signal.SIGTERM)
    while "asked" not in run.rank_log_path(1, 0).read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ranks_die_with_a_killed_launcher(run: RunDir) -> None:
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(600)
"""
    process, pids = _start_launcher(run, source)
    ranks = [psutil.Process(pid) for pid in pids]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive


def test_helpers_of_a_dead_rank_do_not_survive(run: RunDir) -> None:
    source = f"""
import subprocess
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(r"{run.path}/helper", "w").write(str(helper.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert launch(run, attempt=1, num_processes=1, command=_ranks(source)) == 137
    pid = int((run.path / "helper").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lost_lease_kills_the_ranks(run: RunDir) -> None:
    lost = threading.Event()
    lost.set()
    assert launch(run, attempt=1, num_processes=2, command=_ranks("time.sleep(600)"), lost=lost) == 137


def test_a_program_that_does_not_exist_is_a_failure_with_its_reason(run: RunDir) -> None:
    assert launch(run, attempt=1, num_processes=1, command=["/no/such/program"]) == 1
    assert "FileNotFoundError" in describe_failure(0, 1, run.rank_log_path(1, 0))


def test_a_display_whose_terminal_is_gone_does_not_end_the_run(run: RunDir) -> None:
    class Gone:
        polls = 0

        def poll(self) -> None:
            self.polls += 1
            raise BrokenPipeError(32, "Broken pipe")

        def close(self) -> None:
            raise AssertionError("a display that failed is left alone")

    display = Gone()
    source = f"time.sleep(0.5); open(r'{run.path}/done', 'w').close()"
    assert launch(run, attempt=1, num_processes=1, command=_ranks(source), display=display) == 0
    assert (run.path / "done").exists()
    assert display.polls == 1


def test_no_process_is_an_error(run: RunDir) -> None:
    with pytest.raises(ValueError, match=r"launcher\.num_processes: found 0"):
        launch(run, attempt=1, num_processes=0, command=[])


def test_meaning_of_codes() -> None:
    assert from_returncode(-9) == 137
    assert from_returncode(85) == 85
    assert meaning(137) == "killed by SIGKILL"
    assert meaning(85) == "interrupted, saved, resumable"
    assert meaning(200) == "killed by signal 72"
    assert meaning(17) == "exit code 17"


def test_rank_environment_keeps_the_rest() -> None:
    base = {"PATH": "/bin", "RANK": "3", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "64"}
    got = rank_environment(base, rank=0, num_processes=1, port=1, threads=1, attempt=1)
    assert got["PATH"] == "/bin"
    assert "RANK" not in got
    assert "TORCHELASTIC_RUN_ID" not in got
    assert got["OMP_NUM_THREADS"] == "1"
    assert os.environ is not got
