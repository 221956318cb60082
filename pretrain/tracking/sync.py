"""Sending a run directory to MLflow from outside its ranks: after an outage, after the end, before the start.

``python -m pretrain.tracking.sync RUN_DIR`` is what :func:`deliver` starts: a process of its own, so that neither a
supervisor nor a login node waits longer than it wants to, or keeps MLflow in memory.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.tracking.run_files import latest_config_file, redact_url

if TYPE_CHECKING:
    from pretrain.config.schema import TrackingConfig


@dataclass(frozen=True)
class SyncResult:
    """What a sync did: where the run is and how many metric values were sent this time."""

    uri: str
    run_id: str
    num_metrics: int
    link: str


def sync(
    run_path: Path, uri: str | None = None, *, everything: bool = False, lock_timeout_s: float = 120.0
) -> SyncResult:
    """Brings MLflow up to date with the run directory ``run_path``. Safe at any time, also while the run trains.

    ``uri`` replaces the configured store; ``everything`` sends all records again, not only those not yet
    confirmed. Raises ValueError when ``run_path`` is no run directory, BusyError when another process has been sending
    it for ``lock_timeout_s``, and what MLflow raises.
    """
    from pretrain.tracking.store import resolve_uri, run_link
    from pretrain.tracking.uploader import RunUploader

    run_path = run_path.absolute()
    tracking = tracking_of(run_path)
    uploader = RunUploader(
        run_path,
        uri or resolve_uri(tracking),
        tracking.experiment,
        request_timeout_s=tracking.request_timeout_s,
        lock_timeout_s=lock_timeout_s,
    )
    if everything:
        uploader.restart()
    num_metrics = uploader.flush()
    assert uploader.run_id is not None
    link = run_link(uploader.uri, uploader.run_id, uploader.experiment_id)
    return SyncResult(uploader.uri, uploader.run_id, num_metrics, link)


def deliver(run_path: Path, timeout_s: float | None = None) -> bool:
    """Sends what MLflow lacks in at most ``timeout_s`` seconds (None: ``tracking.close_timeout_s``). Never raises.

    For whoever has just written to the run's journal: at submission it makes the run in MLflow (SCHEDULED), after an
    attempt it tells status, restarts and exit class. Returns at once when there is nothing to tell or tracking is not
    enabled; True when MLflow has everything.
    """
    try:
        tracking = tracking_of(run_path)
        if not tracking.enabled or is_delivered(run_path):
            return True
        return (
            subprocess.run(
                [sys.executable, "-m", "pretrain.tracking.sync", str(run_path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=tracking.close_timeout_s if timeout_s is None else timeout_s,
                check=False,
            ).returncode
            == 0
        )
    except Exception:  # Tracking must not change how a run starts or ends.
        return False


def is_delivered(run_path: Path) -> bool:
    """Whether the run's store has all that the run has recorded, by the files of the run directory alone."""
    from pretrain.tracking.spool import Spool
    from pretrain.tracking.store import resolve_uri

    return Spool(run_path, resolve_uri(tracking_of(run_path))).is_delivered()


def tracking_link(run_path: Path) -> str | None:
    """Where a person sees the run in MLflow, None when tracking is not enabled. Quick: reads two small files.

    Raises ValueError when ``run_path`` is no run directory.
    """
    from pretrain.tracking.spool import Spool
    from pretrain.tracking.store import resolve_uri, run_link

    tracking = tracking_of(run_path)
    if not tracking.enabled:
        return None
    uri = resolve_uri(tracking)
    state = Spool(run_path, uri).state
    return run_link(uri, state["run_id"], state["experiment_id"])


def tracking_of(run_path: Path) -> TrackingConfig:
    """The frozen tracking configuration of a run. Raises ValueError when ``run_path`` is no run directory."""
    from pretrain.config.freeze import load
    from pretrain.config.schema import TrackingConfig

    config_path = latest_config_file(run_path)[1]
    if not config_path.is_file():
        raise ValueError(f"{run_path}: not a run directory: expected a file config.yaml in it")
    tree = load(config_path.read_text(encoding="utf-8"), str(config_path))
    return TrackingConfig(**tree.get("tracking", {}))


def main() -> int:
    """Sends the run directory named on the command line; 0 when MLflow has everything."""
    try:
        sync(Path(sys.argv[1]), lock_timeout_s=600.0)
    except Exception as error:
        print(redact_url(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
