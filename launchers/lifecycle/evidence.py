"""Gathering what is known at the end of an attempt: ends of ranks, their own accounts, Slurm's view. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launchers.exit_codes import ExitCode, meaning
from launchers.heartbeat import read_heartbeats
from launchers.lifecycle.attempt import Attempt
from launchers.lifecycle.backend import Backend
from launchers.lifecycle.end_record import read_end_records
from launchers.lifecycle.exit_class import STOP_CODES, Evidence, RankEnd
from launchers.lifecycle.journal import Entry
from launchers.lifecycle.ranks import Ranks
from launchers.run_dir import RunDir
from pretrain.checkpoint.store import CheckpointStore, checkpoint_step
from pretrain.config.files import NO_ROOM, atomic_write_text, way_out
from pretrain.config.schema import Config
from pretrain.tracking.metrics_log import recent_records

_ROOM_BYTES = 65536


def gather(run: RunDir, config: Config, number: int, ranks: Ranks, attempt: Attempt, backend: Backend) -> Evidence:
    """Everything that :func:`launchers.lifecycle.exit_class.classify` looks at, once all ranks have ended."""
    records = read_end_records(run, number)
    known = {end.rank: end for end in ranks.ends()}
    ends = []
    for rank in range(config.launcher.num_processes):
        end = known.get(rank, RankEnd(rank, None))
        if (record := records.get(rank)) is not None:
            # What the kernel or Slurm saw is nearer to the truth than what the rank meant to do; but a rank that had
            # saved and was leaving when it was asked once more has done what it was asked for.
            had_saved = (
                attempt.asked and end.code in STOP_CODES and record.code in (ExitCode.RESUMABLE, ExitCode.FINISHED)
            )
            end = RankEnd(
                rank,
                end.code if end.code is not None and not had_saved else record.code,
                end.node,
                record.time,
                record.message,
                record.consequence,
            )
        ends.append(end)
    stop = attempt.stop
    codes = {end.code for end in ends}
    if stop is None and codes != {int(ExitCode.FINISHED)}:
        unasked = codes <= {int(ExitCode.FINISHED), int(ExitCode.RESUMABLE)}
        told = backend.reason_of(None)
        # Ranks that saved by themselves were asked by someone else: Slurm signals them directly.
        stop = told if told is not None or unasked else None
    return Evidence(
        ends=ends,
        stop=stop,
        killed_ranks=ranks.killed,
        asked=attempt.asked,
        down_nodes=backend.down_nodes(config) if codes != {int(ExitCode.FINISHED)} else (),
        out_of_memory=ranks.out_of_memory(),
        refused=_refusal(run, number) if codes != {int(ExitCode.FINISHED)} else None,
    )


def _refusal(run: RunDir, number: int) -> str | None:
    """Why the run directory takes no files now, as a sentence's beginning with the way out; None when it takes them."""
    probe = run.attempt_path(number) / f".room-{os.getpid()}"
    try:
        try:
            # More than what may be left in the last block of a file that is there already.
            atomic_write_text(probe, " " * _ROOM_BYTES)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            return f"{run.path} takes no more files ({os.strerror(error.errno)}; {way_out(error)})"
    return None


def last_sign_of_life(run: RunDir, started: Entry) -> float:
    """When a rank of the attempt that began with the journal's entry ``started`` last told of itself, unix seconds."""
    beats = read_heartbeats(run, int(started["attempt"]))
    return max([float(started["time"]), *(beat.time for beat in beats)])


@dataclass(frozen=True)
class Steps:
    """Of one attempt: steps of the run completed at its start and at its end, the newest checkpoint's, and the
    seconds from its first record to its first step."""

    first: int | None = None
    last: int | None = None
    saved: int | None = None
    startup_s: float = 0.0


def steps_of(run: RunDir, number: int) -> Steps:
    """What the run's records tell of attempt ``number``."""
    own = [record for record in recent_records(run.metrics_path) if record.get("attempt") == number]
    first = next((record.get("step") for record in own if record["event"] == "start"), None)
    trained = [record["step"] for record in own if record["event"] in ("train", "checkpoint") and "step" in record]
    if first is not None:
        trained.append(first)
    for record in own:
        if record["event"] == "end" and record.get("step") is not None and first is not None:
            trained.append(record["step"])
    trained += _beaten_steps(run, number) if first is not None else []
    latest = CheckpointStore(run.checkpoints_path).latest()
    saved = checkpoint_step(latest.name) if latest is not None else None
    startup = 0.0
    if own and (begun := next((record for record in own if record["event"] == "train"), None)) is not None:
        startup = begun["time"] - own[0]["time"]
    return Steps(first, max(trained, default=None), saved, startup)


def _beaten_steps(run: RunDir, number: int) -> list[int]:
    """Last steps by the ranks' heartbeats: records are written every ``train.log_interval`` steps only."""
    return [beat.step for beat in read_heartbeats(run, number) if beat.step is not None]


def describe_failure(rank: int, code: int, log_path: Path, num_lines: int = 25) -> str:
    """Why a run failed, for its user: which rank, how, its last log lines and where to read the rest."""
    ending = f"rank {rank} ended with code {code} ({meaning(code)})"
    try:
        with open(log_path, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
            lines = stream.read().decode("utf-8", errors="replace").rstrip().split("\n")[-num_lines:]
    except OSError as error:
        return f"{ending}. Its log {log_path} cannot be read ({error.strerror})"
    shown = "\n".join(f"  | {line}" for line in lines)
    return f"{ending}. Its last lines:\n{shown}\nWhole log: {log_path}"
