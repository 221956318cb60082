"""The lease: one writer at a time holds a run directory, and no attempt number is ever used again.

An attempt is claimed by renaming a prepared folder to ``logs/attempt_NNNN``: the rename fails when that
folder exists, so exactly one contender gets a number, and a claim is complete (it holds ``holder.json``)
from its first moment, also when its maker dies right after. ``lease.json`` then carries the holder's
heartbeat. The holder is the highest claim; whoever finds a higher number than its own is *fenced* and must
not write any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from launchers.run_dir import RunDir, RunDirectoryError
from pretrain.config.files import atomic_write_text, fsync_directory

HEARTBEAT_INTERVAL_S = 5.0
# Far above the heartbeat interval plus what clocks of two hosts and a stalled file system may differ by.
STALE_AFTER_S = 120.0

WATCH_S = 3 * HEARTBEAT_INTERVAL_S
"""How long a stale lease of another machine is watched before it is taken over: a living holder beats twice at least in
it, whatever the clocks of the two hosts say."""

_ATTEMPT = re.compile(r"^attempt_(\d{4,})$")


class LeaseHeldError(RunDirectoryError):
    """Another process is writing to this run directory."""


class FencedError(RuntimeError):
    """This attempt no longer owns the run directory: a later attempt does. Stop without writing."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lease. Times in unix seconds; ``machine`` and ``process_start`` unmask reused pids.

    ``job`` is the batch job that the holder is part of, ``life`` how often that job had been queued again by then.
    """

    attempt: int
    host: str
    machine: str
    pid: int
    process_start: str
    acquired: float
    heartbeat: float
    released: bool = False
    job: str | None = None
    life: int = 0


def _machine_identity() -> str:
    """One boot of one machine, seen from one pid namespace: only there does a pid mean the same process."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join([socket.gethostname(), *parts])


def _process_start(pid: int) -> str | None:
    """Start time of a living process as an opaque text, None when it is dead (a zombie is dead)."""
    try:
        # Fields after the command name, which may itself hold blanks and parentheses. State is the first,
        # start the 20th of them: clock ticks since boot, which unlike wall-clock times never shift.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except ProcessLookupError:
        return None
    import psutil  # systems without /proc

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.NoSuchProcess:
        return None


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(
            f"{path}: damaged lease record ({error}); remove it if no process writes here"
        ) from error


def _to_text(holder: Holder) -> str:
    return json.dumps(asdict(holder), indent=1) + "\n"


def current_holder(run: RunDir) -> Holder | None:
    """The last holder, released or not, dead or alive; None before the first attempt."""
    lease = _read_holder(run.lease_path)
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        numbers = [int(m.group(1)) for entry in os.listdir(run.logs_path) if (m := _ATTEMPT.match(entry))]
    highest = max(numbers, default=0)
    if lease is not None and lease.attempt >= highest:
        return lease
    # A claim whose lease.json is not (or not yet) written. A folder without a record still uses up its
    # number.
    claim = _read_holder(run.attempt_path(highest) / "holder.json")
    if claim is None and highest:
        return Holder(highest, "", "", 0, "", 0.0, 0.0, released=True)
    return claim


def check_attempt(run: RunDir, attempt: int) -> None:
    """Raises FencedError when a later attempt holds ``run``. One small read: call it before each write."""
    newer = attempt + 1 if run.attempt_path(attempt + 1).exists() else attempt
    # A network file system may remember for a while that a name does not exist, but opening a file asks the
    # server.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        newer = max(newer, int(json.loads(run.lease_path.read_bytes())["attempt"]))
    if newer > attempt:
        raise FencedError(
            f"{run.path}: attempt {attempt} lost this run directory to attempt {newer}; "
            f"this process stops without writing"
        )


def is_here(holder: Holder) -> bool:
    """Whether the holder's pid is one of this machine's, so that the process can be looked at and be signalled."""
    return holder.machine == _machine_identity()


def shows_life(holder: Holder, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Whether the holder is at work, as far as can be seen from here.

    On this machine its process is looked for, another machine's holder must have given a sign of life in the last
    ``stale_after_s`` seconds.
    """
    if holder.released:
        return False
    if is_here(holder):
        return _process_start(holder.pid) == holder.process_start
    return time.time() - holder.heartbeat <= stale_after_s


def _refuse_if_held(run: RunDir, holder: Holder, stale_after_s: float, job: str | None, life: int) -> None:
    if holder.released:
        return
    if job is not None and holder.job == job and holder.life < life:
        return  # Slurm runs a job once at a time: that life of it is over, whatever its lease still says
    age = time.time() - holder.heartbeat
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.acquired))
    who = f"{run.path}: held by process {holder.pid} on {holder.host} since {since} (attempt {holder.attempt})"
    if holder.machine == _machine_identity():
        if _process_start(holder.pid) == holder.process_start:
            raise LeaseHeldError(
                f"{who}, which is running. One writer at a time may hold a run directory: wait for it, "
                f"or stop it with `kill {holder.pid}` (it saves a checkpoint) and try again."
            )
    elif age <= stale_after_s:
        raise LeaseHeldError(
            f"{who}; last sign of life {max(age, 0.0):.0f} s ago. Stop it there, then try again; "
            f"if that machine is gone, try again after {stale_after_s:.0f} s without a sign of life."
        )


def _refuse_if_it_beats(run: RunDir, holder: Holder, watch_s: float) -> None:
    """Looks at the lease of another machine for ``watch_s``: a heartbeat that changes is a sign of life, whatever time
    that machine takes it to be."""
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, watch_s / 4))
        now = current_holder(run)
        if now is None or now.released or now.attempt != holder.attempt:
            return  # it has left, or someone else was quicker and the claim of that number will fail
        if now.heartbeat != holder.heartbeat:
            away_s = abs(time.time() - now.heartbeat)
            raise LeaseHeldError(
                f"{run.path}: held by process {now.pid} on {now.host} (attempt {now.attempt}), which gives signs of "
                f"life though its clock is {away_s:.0f} s away from this machine's. Stop it there, then try again; and "
                "have the clocks of both set right."
            )


def _claim(run: RunDir, holder: Holder) -> bool:
    """Tries to take ``holder.attempt``; False when another process has it."""
    run.logs_path.mkdir(exist_ok=True)
    prepared = run.logs_path / f".claim-{uuid.uuid4().hex}"
    prepared.mkdir()
    try:
        atomic_write_text(prepared / "holder.json", _to_text(holder))
        os.rename(prepared, run.attempt_path(holder.attempt))
    except OSError:
        # Onto a non-empty folder: ENOTEMPTY or EEXIST, by the file system. Any other failure left no folder
        # there.
        if not run.attempt_path(holder.attempt).exists():
            raise
        return False
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    fsync_directory(run.logs_path)
    return True


class Lease:
    """A held lease with its heartbeat thread. Make one with :meth:`acquire`; use as a context manager.

    ``lost`` is set when a later attempt has taken over; the ranks of this attempt must then be stopped.
    """

    def __init__(self, run: RunDir, holder: Holder, interval_s: float) -> None:
        self.run = run
        self.attempt = holder.attempt
        self.lost = threading.Event()
        self._holder = holder
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run: RunDir,
        *,
        stale_after_s: float = STALE_AFTER_S,
        interval_s: float = HEARTBEAT_INTERVAL_S,
        job: str | None = None,
        life: int = 0,
        after: Lease | None = None,
        watch_s: float = WATCH_S,
    ) -> Lease:
        """Takes the run directory for a new attempt.

        ``after`` is a lease that this process has given back: should its file not say so (the disk was full), it is
        no hindrance.

        A holder that died on this machine is taken over at once, one on another machine when its last
        heartbeat is older than ``stale_after_s`` seconds and it gives no other while this waits for ``watch_s`` (clocks
        of two hosts may differ by more than that age), and an earlier ``life`` of the batch ``job`` that this
        process is part of at once in any case. Raises LeaseHeldError otherwise.
        """
        while True:
            last = current_holder(run)
            if last is not None and (after is None or last.attempt != after.attempt):
                _refuse_if_held(run, last, stale_after_s, job, life)
                if not last.released and not is_here(last) and (job is None or last.job != job):
                    _refuse_if_it_beats(run, last, watch_s)
            now = time.time()
            start = _process_start(os.getpid())
            assert start is not None
            holder = Holder(
                attempt=last.attempt + 1 if last is not None else 1,
                host=socket.gethostname(),
                machine=_machine_identity(),
                pid=os.getpid(),
                process_start=start,
                acquired=now,
                heartbeat=now,
                job=job,
                life=life,
            )
            if _claim(run, holder):
                atomic_write_text(run.lease_path, _to_text(holder))
                return cls(run, holder, interval_s)

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                check_attempt(self.run, self.attempt)
                self._holder = replace(self._holder, heartbeat=time.time())
                atomic_write_text(self.run.lease_path, _to_text(self._holder))
            except FencedError:
                self.lost.set()
                return
            except OSError:
                continue  # A file system that stalls or is full may recover; the next beat tries again.

    def release(self) -> None:
        """Gives the run directory back; harmless when repeated or when the lease was lost.

        On a disk that is full it stays: whoever comes next sees that the holder is dead.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(FencedError, OSError):
            check_attempt(self.run, self.attempt)
            released = replace(self._holder, heartbeat=time.time(), released=True)
            atomic_write_text(self.run.lease_path, _to_text(released))

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
