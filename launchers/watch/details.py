"""What one run's page shows beside its summary: ranks, checkpoints, bad steps, reports, logs. Torch-free.

Like the summary: from files alone, and nothing raises for what they hold.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from launchers.run_dir import RunDir
from launchers.watch.files import TAIL_BYTES, Reader, Record, finite, integer, mapping, number, text
from launchers.watch.summary import RunSummary
from pretrain.checkpoint.store import checkpoint_step

_RANK_LOG = re.compile(r"rank_(\d{5,})\.log")
_BEAT = re.compile(r"rank_(\d{5,})\.json")
_ATTEMPT = re.compile(r"attempt_(\d{4,})")
_JOB_LOG = re.compile(r"job_(\d+)\.log")


@dataclass(frozen=True)
class Beat:
    """A rank as its last heartbeat tells; times in unix seconds."""

    rank: int
    node: str | None
    step: int | None
    phase: str | None
    detail: str | None
    phase_since: float | None
    time: float | None
    stopping: str | None
    collective: str | None


@dataclass(frozen=True)
class Save:
    """A checkpoint that was saved, as ``metrics.jsonl`` tells."""

    step: int
    time: float | None
    seconds: float | None
    num_bytes: int | None


@dataclass(frozen=True)
class BadStep:
    """A step whose numbers were bad, and what was done about it."""

    step: int | None
    kind: str | None
    action: str | None
    loss: float | None
    grad_norm: float | None


@dataclass(frozen=True)
class RunDetails:
    """The rest of a run's page. ``num_bad_steps`` counts all, ``bad_steps`` are the last of them."""

    beats: tuple[Beat, ...]
    checkpoints: tuple[int, ...]
    last_save: Save | None
    bad_steps: tuple[BadStep, ...]
    num_bad_steps: int
    max_restarts: int | None
    reports: tuple[Path, ...]
    supervisor_log: Path | None
    rank_log: Path | None
    mlflow: str | None
    faults: tuple[str, ...]


def read_details(summary: RunSummary) -> RunDetails:
    """Reads what :class:`RunDetails` holds for the run of ``summary``."""
    run, reader = RunDir(summary.path), Reader(summary.path)
    records, _ = reader.tail(run.metrics_path, TAIL_BYTES[0])
    saves = [save for record in records if record["event"] == "checkpoint" and (save := _save(record)) is not None]
    bad = [_bad_step(record) for record in records if record["event"] == "health"]
    steps = {checkpoint_step(name) for name in reader.names(run.checkpoints_path)} - {None}
    reports = [run.path / "reports" / name for name in reader.names(run.path / "reports")]
    supervisor = supervisor_logs(summary.path)
    ranks = rank_logs(summary.path, 0)
    return RunDetails(
        beats=tuple(_beats(reader, run, summary.attempt)) if summary.phase is not None else (),
        checkpoints=tuple(sorted(step for step in steps if step is not None)),
        last_save=saves[-1] if saves else None,
        bad_steps=tuple(bad[-5:]),
        num_bad_steps=max(len(bad), len(reader.names(run.path / "health"))),
        max_restarts=_max_restarts(reader, summary),
        reports=tuple(reports[-3:]),
        supervisor_log=supervisor[-1] if supervisor else None,
        rank_log=ranks[-1][1] if ranks else None,
        mlflow=_mlflow(reader.json(run.mlflow_path)),
        faults=tuple(reader.faults),
    )


def rank_logs(path: Path, rank: int) -> list[tuple[int, Path]]:
    """Attempt and log file of one rank, for every attempt that has one."""
    run = RunDir(path)
    found = []
    for name in Reader(path).names(run.logs_path):
        if (match := _ATTEMPT.fullmatch(name)) and (log := run.rank_log_path(int(match[1]), rank)).is_file():
            found.append((int(match[1]), log))
    return sorted(found)


def known_ranks(path: Path, attempt: int) -> list[int]:
    """Ranks that have a log of ``attempt``."""
    names = Reader(path).names(RunDir(path).attempt_path(attempt))
    return sorted(int(match[1]) for name in names if (match := _RANK_LOG.fullmatch(name)))


def supervisor_logs(path: Path) -> list[Path]:
    """Logs of the run's Slurm jobs, in the order of job ids; none for a run on a workstation."""
    folder = path / "slurm"
    found = [(int(match[1]), name) for name in Reader(path).names(folder) if (match := _JOB_LOG.fullmatch(name))]
    return [folder / name for _, name in sorted(found)]


def _beats(reader: Reader, run: RunDir, attempt: int) -> list[Beat]:
    folder = run.heartbeats_path(attempt)
    beats = []
    for name in reader.names(folder):
        if (match := _BEAT.fullmatch(name)) is None:
            continue
        try:
            # Not through the reader: a beat that cannot be read now comes again, which is no fault.
            record = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            beats.append(_beat(int(match[1]), record))
    return sorted(beats, key=lambda beat: beat.rank)


def _beat(rank: int, record: Record) -> Beat:
    collective = mapping(record, "collective")
    name, count = text(collective, "name"), integer(collective, "count")
    in_it = name is not None and collective.get("running") is not False
    return Beat(
        rank=rank,
        node=text(record, "node") or text(record, "host"),
        step=integer(record, "step"),
        phase=text(record, "phase"),
        detail=text(record, "detail"),
        phase_since=finite(record, "phase_since"),
        time=finite(record, "time"),
        stopping=text(record, "stopping"),
        collective=(f"{name} {count}" if count is not None else name) if in_it else None,
    )


def _save(record: Record) -> Save | None:
    step = integer(record, "step")
    if step is None:
        return None
    return Save(step, finite(record, "time"), finite(record, "seconds"), integer(record, "bytes"))


def _bad_step(record: Record) -> BadStep:
    return BadStep(
        integer(record, "step"),
        text(record, "kind"),
        text(record, "action"),
        number(record, "loss"),
        number(record, "grad_norm"),
    )


def _max_restarts(reader: Reader, summary: RunSummary) -> int | None:
    from launchers.watch.summary import read_config

    return integer(mapping(read_config(reader, summary.path), "launcher"), "max_restarts")


def _mlflow(record: Record) -> str | None:
    uri, run_id = text(record, "uri"), text(record, "run_id")
    if uri is None:
        return None
    from pretrain.tracking.run_files import redact_url

    return f"{run_id} in {redact_url(uri)}" if run_id is not None else f"not yet on {redact_url(uri)}"
