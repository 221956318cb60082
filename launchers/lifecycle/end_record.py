"""``end_rank_00000.json``: how a rank that could still write says it ended. Torch-free.

Written by the rank itself as its last act; a rank that was killed leaves none. ``consequence`` is True when the rank
failed because another one was gone, so that whoever reads it looks for the cause elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import dataclass

from launchers.run_dir import RunDir
from pretrain.config.files import atomic_write_text

_NAME = re.compile(r"^end_rank_(\d{5,})\.json$")
MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class EndRecord:
    """``code`` is the rank's exit code, ``exit_class`` what it takes for its class, ``time`` unix seconds."""

    rank: int
    code: int
    exit_class: str
    message: str
    time: float
    consequence: bool = False


def write_end_record(
    run: RunDir, attempt: int, rank: int, code: int, exit_class: str, message: str, *, consequence: bool = False
) -> None:
    """Replaces the rank's record. Never raises: how a rank ends must not depend on a full disk."""
    record = {
        "code": code,
        "class": exit_class,
        "message": message[:MESSAGE_LENGTH],
        "time": time.time(),
        "consequence": consequence,
    }
    with contextlib.suppress(OSError):
        atomic_write_text(run.end_record_path(attempt, rank), json.dumps(record, ensure_ascii=False) + "\n")


def read_end_records(run: RunDir, attempt: int) -> dict[int, EndRecord]:
    """Records by rank; those that are missing or cannot be read are left out."""
    found: dict[int, EndRecord] = {}
    with contextlib.suppress(OSError):
        for path in run.attempt_path(attempt).iterdir():
            if match := _NAME.match(path.name):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    raw = json.loads(path.read_text(encoding="utf-8"))
                    rank = int(match.group(1))
                    found[rank] = EndRecord(
                        rank=rank,
                        code=int(raw["code"]),
                        exit_class=str(raw["class"]),
                        message=str(raw["message"]),
                        time=float(raw["time"]),
                        consequence=bool(raw.get("consequence", False)),
                    )
    return dict(sorted(found.items()))
