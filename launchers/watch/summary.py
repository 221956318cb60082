"""What is known of a run from its directory alone, with Slurm's word on its job where it can be had. Torch-free.

:func:`summarise` folds journal, lease, metrics and frozen configuration into a :class:`RunSummary`. It reads only the
end of long files, costs milliseconds, and never raises for what the files hold: a run of which half is damaged is
still listed, with the files that could not be read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.lease import Holder
from launchers.run_dir import RunDir
from launchers.watch.attempts import GOES_ON, Attempt, last_job, read_attempts
from launchers.watch.files import Reader, Record, count, finite, integer, mapping, number, text
from launchers.watch.jobs import Jobs, JobView, ask_slurm
from launchers.watch.position import read_position
from launchers.watch.state import ACTIVE, Facts, State, roughly
from pretrain.tracking.run_files import latest_config_file

STILL_AFTER_S = 120.0
"""A running attempt in which nothing happens for so long says so."""


@dataclass(frozen=True)
class RunSummary:
    """A run at one moment. Unknown values are None; times are unix seconds, ``eta_s`` and ``pace_s`` seconds.

    ``note`` says in a few words why the state is what it is. ``restarts`` counts the ends of attempts after which the
    run went on by itself. ``tokens_per_s`` is the median of the last steps, ``pace_s`` the seconds a step takes with
    evaluations and checkpoints. ``moved`` is when something last happened (a step, another phase, an entry of the
    journal), ``heard`` the last sign of life. ``faults`` are files that could not be read.
    """

    path: Path
    name: str
    state: State
    note: str | None
    launcher: str | None
    num_processes: int | None
    step: int | None
    steps: int | None
    loss: float | None
    validation_loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    tokens: float | None
    tokens_per_s: float | None
    pace_s: float | None
    eta_s: float | None
    phase: str | None
    attempt: int
    attempts: tuple[Attempt, ...]
    restarts: int
    exit_class: str | None
    action: str | None
    reason: str | None
    job: str | None
    job_view: JobView | None
    cancel: str | None
    started: float | None
    moved: float | None
    heard: float | None
    faults: tuple[str, ...]

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def summarise_all(paths: Sequence[Path], now: float | None = None) -> tuple[list[RunSummary], str | None]:
    """Summaries in the order of ``paths``, and why Slurm could not be asked if it should have been."""
    first = [summarise(path, now=now) for path in paths]
    jobs = ask_slurm(summary.job for summary in first if summary.job is not None and _wants_slurm(summary))
    if jobs.asked:
        first = [summarise(s.path, jobs, now) if s.job is not None and _wants_slurm(s) else s for s in first]
    return first, jobs.fault


def summarise_one(path: Path, now: float | None = None) -> tuple[RunSummary, str | None]:
    """:func:`summarise_all` for one run."""
    summaries, fault = summarise_all([path], now)
    return summaries[0], fault


def _wants_slurm(summary: RunSummary) -> bool:
    """Ended runs need no word of Slurm: many of them are listed, and their jobs are long forgotten."""
    return summary.is_active or summary.state == State.LOST


def summarise(path: Path, jobs: Jobs | None = None, now: float | None = None) -> RunSummary:
    """A run's summary from its files, and from Slurm's answer if one is given. Never raises for what files hold."""
    now = time.time() if now is None else now
    run, reader = RunDir(path), Reader(path)
    journal = reader.lines(run.lifecycle_path)
    attempts = read_attempts(journal)
    position = read_position(reader, run)
    config = read_config(reader, path)
    holder = _read_holder(reader, run)
    cancel = _read_cancel(reader, run)
    attempt = max(
        [a.number for a in attempts] + [position.attempt or 0, holder.attempt if holder is not None else 0], default=0
    )
    last = attempts[-1] if attempts else None
    ended = next((a for a in reversed(attempts) if a.exit_class is not None), None)
    job = last_job(journal)
    view = jobs.views.get(job) if jobs is not None and job is not None else None
    facts = Facts(journal, last, position, holder, cancel, job, view, bool(jobs and jobs.asked), now)
    state, note = facts.state()
    if cancel is not None and state in ACTIVE:
        note = "; ".join(filter(None, (f"cancel requested{' (now)' if cancel[1] else ''}", note)))
    launcher = mapping(config, "launcher")
    steps = integer(mapping(config, "train"), "steps") or position.steps
    train = mapping(position.train or {}, "metrics")
    heartbeat = reader.json(path / "heartbeats" / f"attempt_{attempt:04d}" / "rank_00000.json")
    step = position.step
    if state == State.RUNNING and (beat := integer(heartbeat, "step")) is not None and 0 <= beat < 1 << 40:
        # Ahead of the metrics when not every step is logged.
        step = max(step or 0, beat)
    eta_s = None
    if state == State.RUNNING and steps is not None and step is not None and position.pace_s is not None:
        eta_s = max(0, steps - step) * position.pace_s
    times = [finite(entry, "time") for entry in journal]
    times += [position.time, holder.acquired if holder is not None else None]
    phase = None
    if state in (State.STARTING, State.RUNNING):
        phase = text(heartbeat, "phase") or position.phase
        times.append(finite(heartbeat, "phase_since"))
    known = [value for value in times if value is not None]
    moved = max(known, default=None)
    if state == State.RUNNING and note is None and moved is not None and now - moved >= STILL_AFTER_S:
        note = f"no new step or phase for {roughly(now - moved)}"
    if state in ACTIVE and holder is not None:
        known += [value for value in (holder.heartbeat, finite(heartbeat, "time")) if value is not None]
    orphan = position.end_status if ended is None and not attempts else None
    return RunSummary(
        path=path,
        name=path.name,
        state=state,
        note=note,
        launcher=text(launcher, "name"),
        num_processes=(last.num_processes if last is not None else None) or integer(launcher, "num_processes"),
        step=step,
        steps=steps,
        loss=number(train, "loss"),
        validation_loss=position.validation_loss,
        grad_norm=number(train, "grad_norm"),
        learning_rate=number(train, "learning_rate"),
        tokens=count(train, "tokens"),
        tokens_per_s=position.tokens_per_s,
        pace_s=position.pace_s,
        eta_s=eta_s,
        phase=phase,
        attempt=attempt,
        attempts=attempts,
        restarts=sum(a.action in GOES_ON for a in attempts),
        exit_class=ended.exit_class if ended is not None else orphan,
        action=ended.action if ended is not None else None,
        reason=ended.reason if ended is not None else position.end_message if orphan else None,
        job=job,
        job_view=view,
        cancel=None if cancel is None else "now" if cancel[1] else "save",
        started=min(known, default=None),
        moved=moved,
        heard=max(known, default=None),
        faults=tuple(reader.faults),
    )


def read_config(reader: Reader, path: Path) -> Record:
    """Launcher and train sections of the highest frozen revision; empty when they cannot be read."""
    try:
        source = latest_config_file(path)[1]
    except OSError:
        source = path / "config.yaml"
    return reader.yaml(source, ("launcher", "train"))


def _read_cancel(reader: Reader, run: RunDir) -> tuple[float, bool] | None:
    if reader.bytes(run.cancel_path) is None:
        return None
    record = reader.json(run.cancel_path)
    return finite(record, "time") or 0.0, record.get("now") is True


def _read_holder(reader: Reader, run: RunDir) -> Holder | None:
    """The last holder, as :func:`launchers.lease.current_holder` finds it, but whatever the records hold."""
    numbers = [
        int(name[8:]) for name in reader.names(run.logs_path) if name.startswith("attempt_") and name[8:].isdecimal()
    ]
    highest = max(numbers, default=0)
    lease = _holder(reader.json(run.lease_path))
    if lease is not None and lease.attempt >= highest:
        return lease
    if not highest:
        return lease
    claim = _holder(reader.json(run.attempt_path(highest) / "holder.json"))
    return claim or Holder(highest, "", "", 0, "", 0.0, 0.0, released=True)


def _holder(record: Record) -> Holder | None:
    attempt, pid, heartbeat = integer(record, "attempt"), integer(record, "pid"), finite(record, "heartbeat")
    if attempt is None or pid is None or heartbeat is None or pid <= 0:
        return None
    return Holder(
        attempt=attempt,
        host=text(record, "host") or "",
        machine=text(record, "machine") or "",
        pid=pid,
        process_start=text(record, "process_start") or "",
        acquired=finite(record, "acquired") or heartbeat,
        heartbeat=heartbeat,
        released=record.get("released") is True,
    )


def read_holder(path: Path) -> Holder | None:
    """Who held the run last, at work or not; None before the first attempt. Never raises for what files hold."""
    return _read_holder(Reader(path), RunDir(path))
