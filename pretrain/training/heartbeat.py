"""The heartbeat of a rank: a thread that tells of it, takes in signals, and answers SIGQUIT with stacks. Torch-free.

The thread lives apart from the main one, so a rank that is stuck still tells where. A rank that holds the
interpreter's lock, is frozen or dead tells nothing any more, and that is seen as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from launchers.exit_codes import ExitCode
from launchers.heartbeat import Collective, Heartbeat, heartbeat_path, write_heartbeat
from pretrain.config.files import atomic_write_text
from pretrain.parallel.pulse import PULSE, Pulse
from pretrain.training.flight import enable_flight_recorder, flight_dump, last_collective
from pretrain.training.signals import StopRequest

if TYPE_CHECKING:
    from launchers.run_dir import RunDir

logger = logging.getLogger("pretrain")

INTERVAL_S = 5.0
# A rank that is asked to stop before its first step leaves by itself at once, or, stuck in a call, after so long.
START_GRACE_S = 5.0


# Modules in which a rank waits for other ranks, also where the flight recorder does not see it.
_COMMUNICATION = (
    "torch.distributed",
    "deepspeed.comm",
    "megatron.core.pipeline_parallel.p2p_communication",
    "pretrain.parallel.process",
)


def innermost_call(thread: int | None) -> tuple[str, bool]:
    """Where a thread stands, ``function (file:line)``, and whether that is in communication with other ranks."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "", False
    code = frame.f_code
    module = str(frame.f_globals.get("__name__", ""))
    return f"{code.co_name} ({code.co_filename}:{frame.f_lineno})", module.startswith(_COMMUNICATION)


@dataclass(frozen=True)
class Place:
    """Rank, attempt and node of this process."""

    rank: int
    attempt: int
    node: str

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Place | None:
        """From the process contract's variables, or torchrun's; None when this is no rank."""
        rank = env.get("RANK" if "TORCHELASTIC_RUN_ID" in env else "SLURM_PROCID", "")
        if not rank.isdigit():
            return None
        return cls(int(rank), int(env.get("PRETRAIN_ATTEMPT", "0")), node_name(env))


def node_name(env: Mapping[str, str]) -> str:
    """This node as Slurm calls it, else the host's name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


class Heart:
    """Tells of this rank every ``interval_s`` seconds, and whenever a signal arrives; :meth:`close` ends it.

    Must be made in the main thread. While it lives, SIGQUIT appends the stacks of all threads to the rank's stacks
    file, whatever the process is doing, and the last collectives go to its flight file.
    """

    def __init__(self, run: RunDir, place: Place, stop: StopRequest, *, pulse: Pulse = PULSE) -> None:
        self.interval_s = INTERVAL_S
        self._run = run
        self._place = place
        self._stop = stop
        self._pulse = pulse
        self._path = heartbeat_path(run, place.attempt, place.rank)
        self._main_thread = threading.main_thread().ident
        self._told_progress = -1
        self._stop_seen: float | None = None
        self._closed = False
        self._stacks: TextIO | None = None
        self._read_end, self._write_end = socket.socketpair()
        self._previous_fd: int | None = None
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Register SIGQUIT, listen for signals and begin to tell."""
        folder = self._run.attempt_path(self._place.attempt)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
        enable_flight_recorder(str(folder / "nccl_flight_rank_"))
        for end in (self._read_end, self._write_end):
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        # Python's handler first, so that the chain ends there and wakes this object's thread.
        signal.signal(signal.SIGQUIT, lambda number, frame: None)
        try:
            path = self._run.stacks_path(self._place.attempt, self._place.rank)
            self._stacks = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
            faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True, chain=True)
        except OSError as error:
            logger.warning("no stack dumps from this rank: %s", error)
        os.register_at_fork(after_in_child=self._forked)
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Write the heartbeat now. Whatever goes wrong is left to the next one: training does not fail for it."""
        pulse = self._pulse
        progress = pulse.progress
        collective: Collective | None = None
        counts: dict[str, int] = {}
        where = ""
        if progress == self._told_progress:
            with contextlib.suppress(Exception):  # the recorder's form differs between versions of torch
                collective, counts = last_collective(flight_dump())
            where, communicates = innermost_call(self._main_thread)
            if communicates and not (collective and collective.running):
                collective = Collective(where.partition(" ")[0], 0, pulse.since)
        self._told_progress = progress
        beat = Heartbeat(
            rank=self._place.rank,
            host=socket.gethostname(),
            node=self._place.node,
            pid=os.getpid(),
            time=time.time(),
            phase=pulse.phase,
            phase_since=pulse.since,
            progress=progress,
            step=pulse.step,
            steps=pulse.steps,
            detail=pulse.detail,
            stopping=self._stop.signal_name,
            collective=collective,
            counts=counts,
            where=where,
        )
        with contextlib.suppress(OSError):
            write_heartbeat(self._path, beat)

    def close(self) -> None:
        """The rank ends: tell it a last time. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._pulse.enter("stop", f"after {self._pulse.phase}")
        with contextlib.suppress(OSError):
            self._write_end.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join(timeout=self.interval_s)
        if threading.current_thread() is threading.main_thread() and self._previous_fd is not None:
            signal.set_wakeup_fd(self._previous_fd)

    def _live(self) -> None:
        while not self._closed:
            numbers = self._wait()
            for number in numbers:
                self._stop.note(number)
            self.beat()
            if signal.SIGQUIT in numbers:
                self._write_flight()
            self._leave_if_stuck_at_start()

    def _wait(self) -> bytes:
        """Numbers of the signals that have arrived; waits for one, at most until the next beat is due."""
        wait_s = self.interval_s
        if self._stop.requested and self._pulse.phase == "start":
            wait_s = min(wait_s, START_GRACE_S / 5)
        with contextlib.suppress(OSError, ValueError):
            if select.select([self._read_end], [], [], wait_s)[0]:
                return self._read_end.recv(4096)
        return b""

    def _write_flight(self) -> None:
        with contextlib.suppress(Exception):  # as in `beat`
            import json

            if (dump := flight_dump()) is not None:
                path = self._run.flight_path(self._place.attempt, self._place.rank)
                atomic_write_text(path, json.dumps(dump, indent=1) + "\n")

    def _leave_if_stuck_at_start(self) -> None:
        """Nothing has been trained, so nothing is lost; a call into C (joining the others) cannot be interrupted."""
        if not self._stop.requested or self._pulse.phase != "start" or self._pulse.steps:
            self._stop_seen = None
            return
        self._stop_seen = self._stop_seen or time.monotonic()
        if time.monotonic() - self._stop_seen > START_GRACE_S:
            logger.info("%s during start-up (%s): leaving", self._stop.signal_name, self._pulse.detail)
            self._pulse.enter("stop")
            self.beat()
            from pretrain.training.failure import record_end_of_rank

            record_end_of_rank(self._run.path, ExitCode.RESUMABLE)
            sys.stdout.flush()
            os._exit(ExitCode.RESUMABLE)

    def _forked(self) -> None:
        """A forked helper is no rank: it must not wake this thread's twin, nor write into the rank's stacks."""
        self._closed = True
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            faulthandler.unregister(signal.SIGQUIT)
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
