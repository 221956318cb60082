"""The local launcher: one process per rank on this machine, with the environment that ``srun`` would give.

Ranks live in sessions of their own, write to their own log files and die with the launcher. A signal to the
launcher is passed on once, so that ranks can save; exit codes of ranks reach the caller unchanged.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launchers.exit_codes import ExitCode, from_returncode, meaning
from launchers.provenance import usable_cpus
from launchers.run_dir import RunDir

POLL_INTERVAL_S = 0.25
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# What another launcher around us told about *its* processes must not reach ours.
_INHERITED = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_")
_INHERITED_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Display(Protocol):
    """What the launcher shows while ranks run (see :mod:`launchers.progress`)."""

    def poll(self) -> None: ...

    def close(self) -> None: ...


def rank_environment(
    base: Mapping[str, str], *, rank: int, num_processes: int, port: int, threads: int, attempt: int
) -> dict[str, str]:
    """One rank's environment: ``base`` without inherited launcher variables, plus ``srun``'s for one node."""
    kept = {
        name: value for name, value in base.items() if not name.startswith(_INHERITED) and name not in _INHERITED_NAMES
    }
    return kept | {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(num_processes),
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "PRETRAIN_ATTEMPT": str(attempt),
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free TCP port that stays bound, not listening, so that no other program is given it meanwhile.

    The rendezvous store binds with SO_REUSEADDR as well, which Linux allows beside a socket that does not
    listen.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@dataclass
class _Rank:
    index: int
    process: subprocess.Popen[bytes]
    log_path: Path
    descriptor: int | None  # pidfd: becomes readable when the process ends

    def signal(self, number: int) -> None:
        # Only the rank itself: its helpers (data workers) are the rank's to stop.
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kills the rank's whole session, helpers that outlived it included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass
class _Supervisor:
    """Watches started ranks until all have ended."""

    ranks: list[_Rank]
    grace_s: float
    display: Display | None
    lost: threading.Event | None
    received: list[int] = field(default_factory=list)
    first_failure: _Rank | None = None
    deadline: float | None = None
    forwarded: bool = False

    def watch(self) -> None:
        while alive := [rank for rank in self.ranks if rank.process.poll() is None]:
            self._note_failure()
            self._act_on_signals(alive)
            if self.lost is not None and self.lost.is_set():
                _say("another process has taken over this run directory: stopping the ranks without saving")
                self._kill()
                self.lost = None
            if self.deadline is not None and time.monotonic() > self.deadline:
                _say(f"ranks still running {self.grace_s:g} s after being asked to stop: killing them")
                self._kill()
            self.show()
            self._wait(alive)
        self._note_failure()
        # Helpers of ranks that died without cleaning up.
        self._kill()

    def show(self) -> None:
        """Updates the display. One that fails (terminal closed, pipe gone) is given up: the ranks go on."""
        if self.display is not None:
            try:
                self.display.poll()
            except Exception as error:
                self.display = None
                _say(f"the progress display failed and is off ({error}); see metrics.jsonl and the rank logs")

    def _wait(self, alive: list[_Rank]) -> None:
        descriptors = [rank.descriptor for rank in alive if rank.descriptor is not None]
        if len(descriptors) == len(alive):
            select.select(descriptors, [], [], POLL_INTERVAL_S)
        else:
            time.sleep(POLL_INTERVAL_S)

    def _note_failure(self) -> None:
        """On the first non-zero end, asks the other ranks to stop: alone they would wait for it for ever."""
        failed = [rank for rank in self.ranks if rank.process.poll()]
        if self.first_failure is not None or not failed:
            return
        # Of ranks that end within one look, a death by signal is the cause and the others its consequence.
        self.first_failure = min(failed, key=lambda rank: (rank.process.returncode > 0, rank.index))
        # A rank that saved and left ends with the others: they need time, not a signal amid their last
        # writes.
        if from_returncode(self.first_failure.process.returncode) != ExitCode.RESUMABLE and not self.forwarded:
            self._terminate()
        self._start_grace()

    def _act_on_signals(self, alive: list[_Rank]) -> None:
        if not self.received:
            return
        name = signal.Signals(self.received[0]).name
        if len(self.received) > 1:
            _say("second signal: killing the ranks")
            self._kill()
        elif not self.forwarded:
            _say(
                f"{name}: asked {len(alive)} rank(s) to save and stop within {self.grace_s:g} s "
                f"(a second signal kills them)"
            )
            self._terminate()
            self._start_grace()

    def _terminate(self) -> None:
        self.forwarded = True
        for rank in self.ranks:
            rank.signal(signal.SIGTERM)

    def _start_grace(self) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace_s

    def _kill(self) -> None:
        self.deadline = None
        for rank in self.ranks:
            rank.kill()


def launch(
    run: RunDir,
    *,
    attempt: int,
    num_processes: int,
    threads_per_process: int | None = None,
    shutdown_grace_s: float = 120.0,
    command: Sequence[str] | None = None,
    display: Display | None = None,
    lost: threading.Event | None = None,
    on_failure: Callable[[int, int, Path], None] | None = None,
) -> int:
    """Starts the ranks of ``attempt``, waits for them and returns the first failing one's exit code, or 0.

    Args:
        threads_per_process: ``OMP_NUM_THREADS``; None shares the usable cores evenly.
        shutdown_grace_s: seconds between asking ranks to stop and killing them.
        command: program and arguments of every rank; None starts training on ``run``.
        display: polled every quarter of a second and closed before this returns.
        on_failure: told rank, exit code and log of the rank that failed first.
        lost: when set, the ranks are killed at once (see :class:`launchers.lease.Lease`).

    Must be called from the main thread: signals arrive there, and the kernel ties ranks to the thread that
    starts them. Death by signal n is returned as 128 + n. Raises ValueError for fewer than one process.
    """
    if num_processes < 1:
        raise ValueError(f"launcher.num_processes: found {num_processes}, must be at least 1; give one rank per device")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("launch must be called from the main thread")
    program = list(command) if command else [sys.executable, "-m", "pretrain.training.entry", str(run.path)]
    threads = threads_per_process or max(1, usable_cpus() // num_processes)
    supervisor = _Supervisor([], shutdown_grace_s, display, lost)
    # Installed before the first rank starts: a signal in between must not leave ranks behind.
    previous = {
        number: signal.signal(number, lambda received, _frame: supervisor.received.append(received))
        for number in _FORWARDED
        # What the caller ignores (SIGHUP under nohup) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        with _reserved_port() as port:
            for rank in range(num_processes):
                environment = rank_environment(
                    os.environ,
                    rank=rank,
                    num_processes=num_processes,
                    port=port,
                    threads=threads,
                    attempt=attempt,
                )
                supervisor.ranks.append(_start(rank, program, environment, run.rank_log_path(attempt, rank)))
            supervisor.watch()
    finally:
        for rank_process in supervisor.ranks:
            rank_process.kill()
            rank_process.process.wait()
            if rank_process.descriptor is not None:
                os.close(rank_process.descriptor)
        supervisor.show()
        if supervisor.display is not None:
            with contextlib.suppress(OSError):
                supervisor.display.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    failure = supervisor.first_failure
    if failure is None:
        return int(ExitCode.FINISHED)
    code = from_returncode(failure.process.returncode)
    if code != ExitCode.RESUMABLE:
        _say(describe_failure(failure.index, code, failure.log_path))
        if on_failure is not None:
            on_failure(failure.index, code, failure.log_path)
    return code


def _start(rank: int, program: list[str], environment: dict[str, str], log_path: Path) -> _Rank:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    shim = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_shim.py")), str(os.getpid())]
    with open(log_path, "ab") as log:
        process = subprocess.Popen(
            [*shim, *program],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    descriptor = None
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or an old kernel
        descriptor = os.pidfd_open(process.pid)
    return _Rank(rank, process, log_path, descriptor)


def describe_failure(rank: int, code: int, log_path: Path, num_lines: int = 25) -> str:
    """Why a run failed, for its user: which rank, how, its last log lines and where to read the rest."""
    with open(log_path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
        lines = stream.read().decode("utf-8", errors="replace").rstrip().split("\n")[-num_lines:]
    shown = "\n".join(f"  | {line}" for line in lines)
    ending = f"rank {rank} ended with code {code} ({meaning(code)})"
    return f"{ending}. Its last lines:\n{shown}\nWhole log: {log_path}"


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        print(f"pretrain: {message}", file=sys.stderr, flush=True)
