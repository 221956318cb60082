"""What an attempt leaves in its record when its ranks could not write it themselves."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from launchers.exit_codes import ExitCode, meaning
from launchers.lease import FencedError, check_attempt
from launchers.run_dir import RunDir
from pretrain.tracking.metrics_log import MetricsLog, recent_records

_LOG_TAIL_BYTES = 65536


def record_end(run: RunDir, attempt: int, code: int) -> bool:
    """Appends an ``end`` event when ``attempt``'s ranks left none, as after SIGKILL; tells whether it did.

    ``code`` is the exit code that the launcher returns. Raises FencedError when a later attempt has taken
    over.
    """
    # The end of a long file is enough, and soon read: a batch system may be about to kill this process.
    own = [record for record in recent_records(run.metrics_path) if record.get("attempt") == attempt]
    if any(record["event"] == "end" for record in own):
        return False
    known: dict[int, str] = {ExitCode.FINISHED: "finished", ExitCode.RESUMABLE: "interrupted"}
    status = known.get(code, "failed")
    steps = [record["step"] for record in own if "step" in record]
    with _log(run, attempt) as log:
        log.write("end", steps[-1] if steps else None, status=status, message=meaning(code))
    return True


def record_failure(run: RunDir, attempt: int, rank: int, code: int, log_path: Path) -> None:
    """Appends which rank failed first, how, and its last log line.

    Other ranks record what that failure did to them, such as a lost connection; this is the cause. Nothing is written
    when a later attempt has taken over.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError), open(log_path, "rb") as stream:  # a rank that never started has none
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").rstrip().splitlines()
    message = f"rank {rank} ended with code {code} ({meaning(code)})" + (f": {lines[-1]}" if lines else "")
    with contextlib.suppress(FencedError), _log(run, attempt) as log:
        log.write("failure", rank=rank, code=code, message=message)


def tell_tracker(run: RunDir, timeout_s: float | None = None) -> bool:
    """Status, restarts and exit class, which ranks cannot know, and all that ranks that were killed left unsent.

    Takes at most ``timeout_s`` seconds (None: ``tracking.close_timeout_s``) and never raises; says so when MLflow could
    not be told.
    """
    from launchers.lifecycle.attempt import say
    from pretrain.tracking.sync import deliver

    told = deliver(run.path, timeout_s)
    if not told:
        say(f"MLflow could not be told; later: pretrain tracking sync {run.path}")
    return told


def _log(run: RunDir, attempt: int) -> MetricsLog:
    return MetricsLog(run.metrics_path, attempt, fence=lambda: check_attempt(run, attempt))
