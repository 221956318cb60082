"""The page about a hang: who holds the attempt up, where, and what the others wait for."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launchers.hang import Hang, name_of
from launchers.heartbeat import Heartbeat
from launchers.run_dir import RunDir
from pretrain.config.files import atomic_write_text

_SHOWN_RANKS = 12
_SHOWN_FRAMES = 16
_SHOWN_FRAMES_OF_WAITING = 6
_SHOWN_COLLECTIVES = 5
_POLL_S = 0.1
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+", re.MULTILINE)

# The outer calls of the threads that fetch for training and for validation.
_FETCHES = re.compile(r'data_pipeline/loader\.py", line \d+ in _produce|training/signals\.py", line \d+ in run')

# What a user may look at first, by the phase of the culprit.
_HINTS = {
    "start": "It was starting: look at its log for imports, data sets and checkpoints on a slow or lost file system.",
    "data": "It was waiting for data: look at the storage of the data set, and at `data` in its log.",
    "forward": "It was in the model's forward pass: look at the stack for a loop, a compilation or a device call.",
    "backward": "It was in the backward pass, where gradients are also summed over ranks: compare the collectives.",
    "all-reduce": "It was agreeing with the other ranks: look at the rank that is missing, or at the network.",
    "optimizer": "It was in the optimizer, where shards are also exchanged between ranks: compare the collectives.",
    "save": "It was writing a checkpoint: look at the file system of the run directory (full, slow, lost).",
    "eval": "It was in validation: look at the storage of the validation data.",
    "sample": "It was writing text samples, which rank 0 does alone while the others wait: lower train.sample_tokens.",
    "stop": "It was ending: look at the tracking server and at the report in its log.",
}


def write_report(
    run: RunDir,
    attempt: int,
    hang: Hang,
    *,
    ask_for_stacks: Callable[[], None] | None = None,
    wait_s: float = 10.0,
) -> Path:
    """Write the page and return its path; raises OSError when it cannot be written.

    ``ask_for_stacks`` sends SIGQUIT to all ranks of the attempt; the page then waits up to ``wait_s`` seconds for
    their stacks. Ranks that are dead give none. A page of the same attempt is replaced.
    """
    ranks = [beat.rank for beat in hang.beats]
    before = {rank: _size(run.stacks_path(attempt, rank)) for rank in ranks}
    if ask_for_stacks is not None:
        ask_for_stacks()
        _wait_for_stacks(run, attempt, before, set(hang.silent), wait_s)
    else:
        before = dict.fromkeys(ranks, 0)
    path = run.hang_report_path(attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, _page(run, attempt, hang, before))
    return path


def main_stack(path: Path, start: int = 0) -> list[str]:
    """Frames of the main thread in the last dump after byte ``start``, innermost first; empty without a dump."""
    # Threads are told from the newest to the oldest, which is the main one.
    threads = _threads(path, start)
    return threads[-1] if threads else []


def data_stack(path: Path, start: int = 0) -> list[str]:
    """As :func:`main_stack`, of the thread that fetches data for the main one."""
    fetching = [frames for frames in _threads(path, start)[:-1] if any(_FETCHES.search(frame) for frame in frames)]
    return fetching[-1] if fetching else []


def _threads(path: Path, start: int) -> list[list[str]]:
    try:
        text = path.read_bytes()[start:].decode("utf-8", errors="replace")
    except OSError:
        return []
    return [
        [line.strip() for line in block.splitlines() if line.strip().startswith("File ")]
        for block in _THREAD.split(text)[1:]
    ]


def _wait_for_stacks(run: RunDir, attempt: int, before: dict[int, int], silent: set[int], wait_s: float) -> None:
    """Until every rank that still tells of itself has written, and no file grows any more."""
    deadline = time.monotonic() + wait_s
    sizes: dict[int, int] = {}
    flights = {rank: _modified(run.flight_path(attempt, rank)) for rank in before}
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        now = {rank: _size(run.stacks_path(attempt, rank)) for rank in before}
        fresh = all(now[rank] > size for rank, size in before.items() if rank not in silent)
        written = all(
            _modified(run.flight_path(attempt, rank)) != flights[rank] for rank in before if rank not in silent
        )
        # A recorder that is not there writes nothing; stacks that are complete are enough after half of the time.
        if fresh and now == sizes and (written or time.monotonic() > deadline - wait_s / 2):
            return
        sizes = now


def _page(run: RunDir, attempt: int, hang: Hang, stacks_from: dict[int, int]) -> str:
    title = f"# {run.path.name}, attempt {attempt}: hang"
    verdict = f"Culprit: {hang.reason}." if hang.rank is not None else f"No rank stands out: {hang.reason}."
    parts = [
        title,
        f"Found {time.strftime('%Y-%m-%d %H:%M:%S')}; nothing had moved for {_duration(hang.seconds)}.",
        f"**{verdict}**",
        _HINTS.get(hang.phase or "", ""),
        "## Ranks\n\n" + _table(hang),
    ]
    others = [beat.rank for beat in hang.beats if beat.rank not in hang.culprits]
    shown = hang.culprits[:2] or others[:1]
    for rank in shown:
        parts.append(_stack(run, attempt, hang, rank, stacks_from.get(rank, 0), _SHOWN_FRAMES))
    waiting = next((b.rank for b in hang.beats if b.rank in others and b.collective and b.collective.running), None)
    if waiting is None:
        waiting = next((rank for rank in others if rank not in shown), None)
    if waiting is not None:
        start = stacks_from.get(waiting, 0)
        parts.append(_stack(run, attempt, hang, waiting, start, _SHOWN_FRAMES_OF_WAITING, ", which waits,"))
    if flights := [
        text for rank in [*shown[:1], waiting] if rank is not None and (text := _flight(run, attempt, rank))
    ]:
        parts.append("## Last collectives (torch's flight recorder)\n\n" + "\n\n".join(flights))
    folder = run.attempt_path(attempt).relative_to(run.path)
    parts.append(
        f"Whole stacks of every rank: `{folder}/stacks_rank_*.txt`; collectives: `{folder}/flight_rank_*.json`; "
        f"logs: `{folder}/rank_*.log`; heartbeats: `{run.heartbeats_path(attempt).relative_to(run.path)}/`."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(hang: Hang) -> str:
    """Culprits first, then others; what is left is summed up by phase and collective."""
    first = sorted(hang.beats, key=lambda beat: (beat.rank not in hang.culprits, beat.rank))
    lines = [
        "| | rank | node | pid | step | phase | for | collective |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for beat in first[:_SHOWN_RANKS]:
        mark = "**culprit**" if beat.rank in hang.culprits else ""
        phase = f"{beat.phase} ({beat.detail})" if beat.detail else beat.phase
        if beat.rank in hang.silent:
            phase += ", **silent**"
        since = _duration(max(0.0, beat.time - beat.phase_since))
        step = "-" if beat.step is None else str(beat.step)
        lines.append(
            f"| {mark} | {beat.rank} | {beat.node} | {beat.pid} | {step} | {phase} | {since} | {_collective(beat)} |"
        )
    lines += [
        f"| **culprit** | {rank} | - | - | - | never told of itself | - | - |"
        for rank in hang.silent
        if rank not in {beat.rank for beat in hang.beats}
    ][:_SHOWN_RANKS]
    rest = Counter((beat.phase, _collective(beat)) for beat in first[_SHOWN_RANKS:])
    lines += [f"| | {count} more | | | | {phase} | | {where} |" for (phase, where), count in rest.most_common()]
    return "\n".join(lines)


def _collective(beat: Heartbeat) -> str:
    told = beat.collective
    if told is None:
        return "-"
    where = name_of(told)
    return f"in {where} for {_duration(max(0.0, beat.time - told.since))}" if told.running else f"last: {where}"


def _stack(run: RunDir, attempt: int, hang: Hang, rank: int, start: int, limit: int, words: str = "") -> str:
    frames = main_stack(run.stacks_path(attempt, rank), start)
    head = f"## Where rank {rank}{words} stands (main thread, innermost call first)"
    if not frames:
        last = next((beat.where for beat in hang.beats if beat.rank == rank and beat.where), None)
        known = f" It last told of itself at `{last}`." if last else ""
        return f"{head}\n\nNo stack: the process is dead or frozen, or it ended before it could be asked.{known}"
    text = f"{head}\n\n{_frames(frames, limit)}"
    fetching = data_stack(run.stacks_path(attempt, rank), start)
    if not words and fetching and any(beat.rank == rank and beat.phase in ("data", "eval") for beat in hang.beats):
        text += f"\n\nIts thread that fetches data:\n\n{_frames(fetching, limit)}"
    return text


def _frames(frames: Sequence[str], limit: int) -> str:
    more = [f"... and {len(frames) - limit} more"] if len(frames) > limit else []
    return "```\n" + "\n".join([*frames[:limit], *more]) + "\n```"


def _flight(run: RunDir, attempt: int, rank: int) -> str:
    entries: Sequence[dict[str, Any]] = ()
    with contextlib.suppress(OSError, ValueError, KeyError):
        entries = json.loads(run.flight_path(attempt, rank).read_text(encoding="utf-8"))["entries"]
    if not entries:
        return ""
    lines = []
    for entry in entries[-_SHOWN_COLLECTIVES:]:
        number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id")
        state = "done" if entry.get("retired") or entry.get("state") == "completed" else "running"
        at = time.strftime("%H:%M:%S", time.localtime(entry.get("time_created_ns", 0) / 1e9))
        lines.append(f"{at} {entry.get('profiling_name')} no. {number} {entry.get('input_sizes')} {state}")
    return f"Rank {rank}:\n\n```\n" + "\n".join(lines) + "\n```"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
