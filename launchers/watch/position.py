"""Where a run stands by the end of its ``metrics.jsonl``. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launchers.run_dir import RunDir
from launchers.watch.files import TAIL_BYTES, Reader, Record, finite, integer, mapping, number, text

_PACE_STEPS = 200
_SPEED_STEPS = 20


@dataclass
class Position:
    """What the end of ``metrics.jsonl`` tells."""

    step: int | None = None
    steps: int | None = None
    train: Record | None = None
    validation_loss: float | None = None
    attempt: int | None = None
    has_trained: bool = False
    end_status: str | None = None
    end_message: str | None = None
    tokens_per_s: float | None = None
    pace_s: float | None = None
    phase: str | None = None
    time: float | None = None


def read_position(reader: Reader, run: RunDir) -> Position:
    records: list[Record] = []
    for limit in TAIL_BYTES:
        records, whole = reader.tail(run.metrics_path, limit)
        if whole or any(record["event"] == "train" for record in records):
            break
    return fold(records)


def fold(records: Sequence[Record]) -> Position:
    """Where the run stands after ``records``."""
    place = Position()
    train: list[Record] = []
    for record in records:
        event, attempt, step = record["event"], integer(record, "attempt"), integer(record, "step")
        if event != "lifecycle" and (when := finite(record, "time")) is not None:
            place.time = when
        if event in ("start", "phase", "train", "end") and attempt != place.attempt:
            place.attempt, place.has_trained, place.phase = attempt, False, None
            place.end_status = place.end_message = None
        if event == "start":
            place.step, place.steps, place.end_status = step, integer(record, "steps"), None
        elif event == "phase":
            place.phase = text(record, "name")
        elif event == "train" and step is not None:
            place.step, place.train, place.has_trained, place.phase = step, record, True, None
            # Only steps in a row give a pace: a new attempt and a rollback start anew.
            if train and (train[-1].get("attempt") != attempt or (integer(train[-1], "step") or 0) >= step):
                train.clear()
            train.append(record)
        elif event == "eval":
            place.validation_loss, place.phase = number(mapping(record, "metrics"), "validation_loss"), None
        elif event == "end":
            place.end_status, place.end_message = text(record, "status"), text(record, "message")
            place.step = step if step is not None else place.step
    place.tokens_per_s, place.pace_s = _speed(train[-_SPEED_STEPS:]), _pace(train[-_PACE_STEPS:])
    return place


def _speed(train: Sequence[Record]) -> float | None:
    values = [finite(mapping(record, "metrics"), "tokens_per_s") for record in train]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _pace(train: Sequence[Record]) -> float | None:
    """Seconds a step, with all that happens between steps; of a single record, the step alone."""
    if not train:
        return None
    first, last = train[0], train[-1]
    steps = (integer(last, "step") or 0) - (integer(first, "step") or 0)
    begun, ended = finite(first, "time"), finite(last, "time")
    if steps > 0 and begun is not None and ended is not None and ended >= begun:
        return (ended - begun) / steps
    return finite(mapping(last, "metrics"), "step_s")
