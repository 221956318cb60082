"""``lifecycle.jsonl``: what happened to a run as a whole, one JSON object a line. Torch-free.

``{"time": unix seconds, "event": ...}`` with the fields of the event:

==================== ============================================================================================
``submitted``        ``job``, ``script``, ``kind`` (first, resume or chain), ``exclude`` (nodes)
``attempt_started``  ``attempt``, ``launcher``, ``job`` or null, ``nodes``, ``num_processes``
``attempt_ended``    ``attempt``, ``exit_class``, ``action``, ``reason`` (a sentence), ``first_step``, ``last_step``,
                     ``saved_step``, ``rank``, ``node``, ``code``, ``report`` (path); each of the last seven may be
                     null; ``exclude`` (nodes left out from now on)
``requeued``         ``job``, ``exclude`` (nodes)
``exclusion_lifted`` ``nodes``, ``reason``: nodes that the run is let back to
``cancel_requested`` ``now`` (bool), ``by``
``cancelled``        ``job`` or null
``resized``          ``revision``, ``num_nodes``, ``num_processes``; ``full_nodes``, ``full_processes`` (as asked for)
``requeue_failed``   ``job``, ``message``: the run waits for its user
``gave_up``          ``job``, ``message``: so did the supervisor, which could not go on (disk full)
==================== ============================================================================================

Appended by whoever acts: the command on a login node, the supervisor of an attempt, ``pretrain cancel``. Lines are
appended whole; a line torn by a crash is skipped by readers and closed by the next writer.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launchers.run_dir import RunDir

Entry = dict[str, Any]


def append(run: RunDir, event: str, **fields: Any) -> Entry:
    """Appends one event and returns it. Raises OSError when the line cannot be written whole (disk full)."""
    entry: Entry = {"time": time.time(), "event": event, **fields}
    line = json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"
    descriptor = os.open(run.lifecycle_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        # One call a line, so that lines of two writers cannot mix and a crash tears at most the last one.
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


def append_making_room(run: RunDir, ended: int, event: str, /, **fields: Any) -> Entry:
    """:func:`append` after the end of attempt ``ended``: on a full disk that attempt's signs of life make room."""
    try:
        return append(run, event, **fields)
    except OSError:
        shutil.rmtree(run.heartbeats_path(ended), ignore_errors=True)
        return append(run, event, **fields)


def read_journal(run: RunDir | Path) -> list[Entry]:
    """All readable entries in the order written; none when there is no journal yet."""
    path = run.lifecycle_path if isinstance(run, RunDir) else run / "lifecycle.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [entry for line in data.split(b"\n") if (entry := _decode(line)) is not None]


def _decode(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def last_entry(entries: Iterable[Entry], *events: str) -> Entry | None:
    """The last entry of one of ``events``; None without any."""
    return next((entry for entry in reversed(list(entries)) if entry["event"] in events), None)
