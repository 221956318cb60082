"""Heartbeats: what each rank of an attempt says of itself, in one small file per rank.

A file is replaced at each beat, so a reader sees the last complete one. Nothing here is durable: a heartbeat that is
lost in a crash is worth nothing. Phases: ``start``, ``data``, ``forward``, ``backward``, ``all-reduce``,
``optimizer``, ``save``, ``eval``, ``sample``, ``stop``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launchers.run_dir import RunDir

PHASES = ("start", "data", "forward", "backward", "all-reduce", "optimizer", "save", "eval", "sample", "stop")

_NAME = re.compile(r"^rank_(\d{5,})\.json$")


@dataclass(frozen=True)
class Collective:
    """The collective that a rank entered last, as torch's flight recorder tells.

    ``count`` numbers the collectives of ``group`` (a name, equal on all its ranks) from 1; ``since`` is the unix time
    at which the rank entered it; ``running`` says whether it was still in it. ``ranks`` are the group's members, empty
    for all ranks. A call that the recorder does not know (gloo's transfers between two ranks) has ``count`` 0.
    """

    name: str
    count: int
    since: float
    group: str = ""
    running: bool = True
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """One rank at ``time`` (unix seconds by its own clock, as all times here).

    ``step`` is the last completed step of the run, None before the state is known; ``steps`` counts those that this
    attempt completed. ``progress`` grows with every sign of work: a change of phase, a micro-batch, a written tensor.
    ``detail`` says more about the phase (what is being loaded). ``stopping`` names the signal that asked the rank to
    stop. Only a rank without progress since its last beat tells ``collective``, ``counts`` (by group, how many
    collectives it has entered) and ``where`` (the innermost call of its main thread).
    """

    rank: int
    host: str
    node: str
    pid: int
    time: float
    phase: str
    phase_since: float
    progress: int
    step: int | None = None
    steps: int = 0
    detail: str = ""
    stopping: str | None = None
    collective: Collective | None = None
    counts: dict[str, int] = field(default_factory=dict)
    where: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Heartbeat:
        """Raises TypeError or KeyError when the record is not a heartbeat; keys of later versions are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        if known.get("collective") is not None:
            told = known["collective"]
            names = Collective.__dataclass_fields__
            known["collective"] = Collective(**{name: told[name] for name in names if name in told})
        return cls(**known)


def heartbeat_path(run: RunDir, attempt: int, rank: int) -> Path:
    """The file of ``rank``."""
    return run.heartbeats_path(attempt) / f"rank_{rank:05d}.json"


def write_heartbeat(path: Path, beat: Heartbeat) -> None:
    """Replace ``path``; raises OSError (disk full, no permission), the old beat then stays."""
    # Not `atomic_write_text`: a beat that must reach the disk each time would be dear, and worth nothing after a crash.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_heartbeats(run: RunDir, attempt: int) -> list[Heartbeat]:
    """The last beat of each rank that has told one, by rank. What cannot be read is left out: it may come again."""
    folder = run.heartbeats_path(attempt)
    beats = []
    try:
        names = sorted(name for name in os.listdir(folder) if _NAME.match(name))
    except OSError:
        return []
    for name in names:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            beats.append(Heartbeat.from_dict(json.loads((folder / name).read_text(encoding="utf-8"))))
    return sorted(beats, key=lambda beat: beat.rank)
