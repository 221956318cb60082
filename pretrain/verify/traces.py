"""Reading traces: the lines of all ranks of an attempt, joined by step. Torch-free.

:mod:`pretrain.training.trace` says what a line holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launchers.run_dir import trace_file

Record = dict[str, Any]

_MODULUS = 1 << 64


@dataclass(frozen=True)
class Moment:
    """What all ranks recorded of one step (or of the state they start from), in the order of ranks."""

    step: int
    records: tuple[Record, ...]

    @property
    def loss(self) -> float:
        return float(self.records[0]["loss"])

    @property
    def grad_norm(self) -> float:
        return float(self.records[0]["grad_norm"])

    @cached_property
    def sample_ids(self) -> list[int]:
        """The global batch: ids of all data-parallel ranks in global order, repetitions kept."""
        return sorted(i for record in self.records if record["leader"] for i in record["sample_ids"])

    @cached_property
    def state(self) -> dict[str, str]:
        """Digest of each whole logical tensor by ``slot:name``: the sum over ranks of their shares."""
        sums: dict[str, int] = {}
        for record in self.records:
            for key, digest in record["state"].items():
                sums[key] = (sums.get(key, 0) + int(digest, 16)) % _MODULUS
        return {key: f"{value:016x}" for key, value in sums.items()}


@dataclass(frozen=True)
class AttemptTrace:
    """One attempt: the state it started from and every step that all its ranks recorded."""

    start: Moment
    steps: dict[int, Moment]


def read_attempt(folder: Path, num_ranks: int) -> AttemptTrace:
    """Read the traces of ``num_ranks`` ranks; a last line torn by a kill is left out.

    Raises:
        ValueError: a rank's file is missing, damaged or without its start record.
    """
    by_rank = [_records(trace_file(folder, rank)) for rank in range(num_ranks)]
    starts = [records.pop(0, None) for records in by_rank]
    known = [start for start in starts if start is not None]
    if len(known) < num_ranks:
        raise ValueError(f"{folder}: rank {starts.index(None)} recorded no start; its log says why")
    common = sorted(set.intersection(*(set(records) for records in by_rank)))
    steps = {step: Moment(step, tuple(records[step] for records in by_rank)) for step in common}
    return AttemptTrace(Moment(int(known[0]["step"]), tuple(known)), steps)


def _records(path: Path) -> dict[int, Record]:
    """Records by step; the one of event ``start`` under 0, which is no step's number."""
    if not path.is_file():
        raise ValueError(f"{path}: no such trace; expected one of a run with train.trace=true")
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: not a trace: {error}") from error
    return {0 if record["event"] == "start" else int(record["step"]): record for record in records}
