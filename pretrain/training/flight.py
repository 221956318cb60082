"""torch's flight recorder: which collectives this rank has entered, and which it is still in.

The recorder keeps the last collectives of the process in memory (``TORCH_FR_BUFFER_SIZE``), for NCCL and, since torch
2.8, for gloo. It is read from the heartbeat's thread, also while the main thread is stuck in a collective.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from launchers.heartbeat import Collective

BUFFER_SIZE = "TORCH_FR_BUFFER_SIZE"
_KEPT = 256
# Functions of `torch._C._distributed_c10d`; which of them exist depends on version and build of torch.
_DUMPS = {"nccl": "_dump_nccl_trace_json", "any": "_dump_fr_trace_json"}


def enable_flight_recorder(nccl_dump_prefix: str) -> None:
    """Before torch is imported: keep the last collectives, and write NCCL's own dumps to files with this prefix.

    What the user has set stays.
    """
    os.environ.setdefault(BUFFER_SIZE, str(_KEPT))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", nccl_dump_prefix)


def flight_dump() -> dict[str, Any] | None:
    """What the recorder holds, None where there is none: ``entries`` (oldest first) and ``pg_status`` by group."""
    module = sys.modules.get("torch._C._distributed_c10d")
    if module is None or not _is_initialized():
        return None
    merged: dict[str, Any] | None = None
    for name in _DUMPS.values():
        dump: Callable[[], bytes | str] | None = getattr(module, name, None)
        if dump is None:
            continue
        try:
            told = json.loads(dump())
        except (ValueError, RuntimeError, TypeError):
            continue
        if merged is None:
            merged = {"version": told.get("version"), "entries": [], "status": []}
        known = {(entry.get("record_id"), entry.get("profiling_name")) for entry in merged["entries"]}
        fresh = [e for e in told.get("entries", []) if (e.get("record_id"), e.get("profiling_name")) not in known]
        merged["entries"] += fresh
        merged["status"].append({"entries": len(fresh), "pg_status": told.get("pg_status", {})})
    return merged


def last_collective(dump: dict[str, Any] | None) -> tuple[Collective | None, dict[str, int]]:
    """The collective that holds this rank up, or else its last one; and by group how many it has entered."""
    if dump is None or not dump["entries"]:
        return None, {}
    entries = sorted(dump["entries"], key=lambda entry: entry.get("time_created_ns", 0))
    counts: dict[str, int] = {}
    for entry in entries:
        group = _group(entry)
        counts[group] = max(counts.get(group, 0), _count(entry))
    running = [entry for entry in entries if _is_running(entry)]
    chosen = running[0] if running else entries[-1]
    return (
        Collective(
            name=str(chosen.get("profiling_name", "?")).rpartition(":")[2],
            count=_count(chosen),
            since=chosen.get("time_created_ns", 0) / 1e9,
            group=_group(chosen),
            running=bool(running),
            ranks=_members(chosen),
        ),
        counts,
    )


def _group(entry: dict[str, Any]) -> str:
    """A name equal on all ranks of the group: the back end and torch's name of the group."""
    name, description = [*entry.get("process_group", ["?", ""]), ""][:2]
    back_end = str(entry.get("profiling_name", "")).partition(":")[0]
    kind = "default" if description == "default_pg" else f"group {name}"
    # Collectives and transfers between two ranks are numbered apart.
    return f"{back_end} {kind}{' (transfers)' if entry.get('is_p2p') else ''}"


def _count(entry: dict[str, Any]) -> int:
    return int(entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id") or 0)


def _is_running(entry: dict[str, Any]) -> bool:
    # gloo never says "completed": what has ended is retired.
    return not entry.get("retired", False) and entry.get("state") != "completed"


def _members(entry: dict[str, Any]) -> list[int]:
    """Ranks of the entry's group; empty for the default group, or where torch does not tell."""
    name, description = [*entry.get("process_group", ["?", ""]), ""][:2]
    if description == "default_pg":
        return []
    module: Any = sys.modules["torch.distributed.distributed_c10d"]
    for group, known in list(module._world.pg_names.items()):
        if known == name:
            return sorted(module._world.pg_group_ranks.get(group, {}))
    return []


def _is_initialized() -> bool:
    module: Any = sys.modules.get("torch.distributed")
    return module is not None and bool(module.is_initialized())
