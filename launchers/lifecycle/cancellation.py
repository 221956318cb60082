"""``cancel.json``: a user's wish that a run end, left in its directory for whoever supervises it. Torch-free."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from launchers.run_dir import RunDir
from pretrain.config.files import atomic_write_text


@dataclass(frozen=True)
class Cancellation:
    """``now``: without a checkpoint. ``time`` in unix seconds."""

    time: float
    now: bool


def request(run: RunDir, *, now: bool) -> Cancellation:
    """Leaves the wish; a later one replaces an earlier one. Raises OSError."""
    wish = Cancellation(time.time(), now)
    atomic_write_text(run.cancel_path, json.dumps({"time": wish.time, "now": wish.now}) + "\n")
    return wish


def read(run: RunDir) -> Cancellation | None:
    """The wish, if there is one. A file that cannot be read counts as a wish to save and stop."""
    try:
        record = json.loads(run.cancel_path.read_text(encoding="utf-8"))
        return Cancellation(float(record["time"]), bool(record["now"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Cancellation(0.0, False)
    except OSError:
        return None  # a file system that stalls; the next look tries again


def withdraw(run: RunDir) -> bool:
    """Removes the wish, as a user's new run or resume does; tells whether there was one."""
    try:
        run.cancel_path.unlink()
    except FileNotFoundError:
        return False
    return True
