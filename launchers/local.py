"""The local launcher: one process per rank on this machine, with the environment that ``srun`` would give.

Ranks live in sessions of their own, write to their own log files and die with the launcher. What is done with them is
the supervisor's (:mod:`launchers.lifecycle.supervise`).
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.exit_codes import from_returncode
from launchers.lifecycle.exit_class import ExitClass, RankEnd, StopReason, Verdict
from launchers.lifecycle.journal import Entry
from launchers.lifecycle.memory import oom_kills
from launchers.lifecycle.ranks import Ranks
from launchers.provenance import usable_cpus
from launchers.run_dir import RunDir
from pretrain.config.launch_schema import LocalConfig
from pretrain.config.schema import Config

# What another launcher around us told about *its* processes must not reach ours.
_INHERITED = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_")
_INHERITED_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


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
    descriptor: int | None  # pidfd: becomes readable when the process ends
    ended: float | None = None

    def alive(self) -> bool:
        if self.process.poll() is None:
            return True
        if self.ended is None:
            self.ended = time.time()
        return False

    def signal(self, number: int) -> None:
        # Only the rank itself: its helpers (data workers) are the rank's to stop.
        if self.alive():
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kills the rank's whole session, helpers that outlived it included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class LocalRanks:
    """Ranks as child processes (see :class:`launchers.lifecycle.ranks.Ranks`). Use as a context manager."""

    def __init__(self) -> None:
        self.killed: frozenset[int] = frozenset()
        self._ranks: list[_Rank] = []
        self._node = socket.gethostname()
        self._oom_kills = oom_kills()

    def start(self, rank: int, program: Sequence[str], environment: Mapping[str, str], log_path: Path) -> None:
        """Starts one rank. A program that cannot be started ends as any failing program does, its log says why."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        shim = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_shim.py")), str(os.getpid())]
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                [*shim, *program],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        descriptor = None
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or an old kernel
            descriptor = os.pidfd_open(process.pid)
        self._ranks.append(_Rank(rank, process, descriptor))

    def ends(self) -> list[RankEnd]:
        return [
            RankEnd(rank.index, from_returncode(rank.process.returncode), self._node, rank.ended)
            for rank in self._ranks
            if not rank.alive()
        ]

    def num_running(self) -> int:
        return sum(rank.alive() for rank in self._ranks)

    def ask_to_stop(self) -> None:
        for rank in self._ranks:
            rank.signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        for rank in self._ranks:
            rank.signal(signal.SIGQUIT)

    def kill(self) -> None:
        self.killed |= {rank.index for rank in self._ranks if rank.alive()}
        for rank in self._ranks:
            rank.kill()

    def wait(self, seconds: float) -> None:
        alive = [rank for rank in self._ranks if rank.alive()]
        descriptors = [rank.descriptor for rank in alive if rank.descriptor is not None]
        if len(descriptors) == len(alive):
            # poll, not select: descriptors above 1023 are nothing unusual.
            poll = select.poll()
            for descriptor in descriptors:
                poll.register(descriptor, select.POLLIN)
            poll.poll(1000 * seconds)
        else:
            time.sleep(seconds)

    def out_of_memory(self) -> frozenset[int]:
        now = oom_kills()
        if now is None or self._oom_kills is None or now.count <= self._oom_kills.count:
            return frozenset()
        if now.anyone_s:
            # It may have been another's process: only a rank that was killed can have been the one.
            return frozenset(end.rank for end in self.ends() if end.code == 128 + signal.SIGKILL)
        return frozenset({-1})

    def close(self) -> None:
        """Kills what is left, helpers of ranks that died without cleaning up included."""
        for rank in self._ranks:
            rank.kill()
            rank.process.wait()
            if rank.descriptor is not None:
                os.close(rank.descriptor)
                rank.descriptor = None


class LocalBackend:
    """Attempts on this machine (see :class:`launchers.lifecycle.backend.Backend`)."""

    name = "local"
    job: int | None = None
    queue = False
    second_signal_kills = True
    kill_wait_s = 0.0

    def prepare(self, run: RunDir, config: Config, excluded: frozenset[str]) -> Config:
        return config

    def nodes(self, config: Config) -> list[str]:
        return [socket.gethostname()]

    def can_stay(self, run: RunDir, config: Config, excluded: frozenset[str]) -> bool:
        return True

    def end_time(self) -> float | None:
        return None

    def down_nodes(self, config: Config) -> list[str]:
        return []

    def check_nodes(self, run: RunDir, config: Config, attempt: int) -> None:
        return None

    def vanished(self, started: Entry, last_sign: float) -> Verdict:
        return Verdict(ExitClass.KILLED, f"the launcher of attempt {started['attempt']} was killed")

    def reason_of(self, number: int | None) -> StopReason | None:
        if number is None:
            return None
        return StopReason(ExitClass.INTERRUPTED, f"stopped by {signal.Signals(number).name}")

    @contextlib.contextmanager
    def start(self, run: RunDir, config: Config, attempt: int, program: Sequence[str]) -> Iterator[Ranks]:
        """Starts all ranks; those that are left are killed on the way out.

        Must be called from the main thread: the kernel ties ranks to the thread that starts them. Raises ValueError
        for fewer than one process.
        """
        launcher = config.launcher
        assert isinstance(launcher, LocalConfig)
        with start_ranks(
            run,
            attempt=attempt,
            num_processes=launcher.num_processes,
            threads_per_process=launcher.threads_per_process,
            program=program,
        ) as ranks:
            yield ranks


@contextlib.contextmanager
def start_ranks(
    run: RunDir, *, attempt: int, num_processes: int, threads_per_process: int | None, program: Sequence[str]
) -> Iterator[LocalRanks]:
    """``num_processes`` ranks of ``attempt``, each ``program``; ``threads_per_process`` None shares the usable cores.

    Raises ValueError for fewer than one process, RuntimeError outside the main thread.
    """
    if num_processes < 1:
        raise ValueError(f"launcher.num_processes: found {num_processes}, must be at least 1; give one rank per device")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("ranks must be started from the main thread")
    threads = threads_per_process or max(1, usable_cpus() // num_processes)
    ranks = LocalRanks()
    try:
        with _reserved_port() as port:
            for rank in range(num_processes):
                environment = rank_environment(
                    os.environ, rank=rank, num_processes=num_processes, port=port, threads=threads, attempt=attempt
                )
                ranks.start(rank, program, environment, run.rank_log_path(attempt, rank))
            yield ranks
    finally:
        ranks.close()
