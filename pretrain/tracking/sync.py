"""``pretrain sync RUN_DIR``: sends to MLflow what is missing there, as after an outage. Safe to repeat."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.tracking.run_files import latest_config_file, redact_url


@dataclass(frozen=True)
class SyncResult:
    """What a sync did: where the run is and how many metric values were sent this time."""

    uri: str
    run_id: str
    num_metrics: int


def sync(run_path: Path, uri: str | None = None, *, everything: bool = False) -> SyncResult:
    """Brings MLflow up to date with the run directory ``run_path``.

    ``uri`` replaces the configured store; ``everything`` sends all records again, not only those not yet
    confirmed. Raises ValueError when ``run_path`` is no run directory, and what MLflow raises.
    """
    from pretrain.config.freeze import load
    from pretrain.config.schema import TrackingConfig
    from pretrain.tracking.store import resolve_uri
    from pretrain.tracking.uploader import RunUploader

    run_path = run_path.absolute()
    config_path = latest_config_file(run_path)[1]
    if not config_path.is_file():
        raise ValueError(f"{run_path}: not a run directory: expected a file config.yaml in it")
    tree = load(config_path.read_text(encoding="utf-8"), str(config_path))
    tracking = TrackingConfig(**tree.get("tracking", {}))
    uploader = RunUploader(run_path, uri or resolve_uri(tracking), tracking.experiment)
    if everything:
        uploader.restart()
    num_metrics = uploader.flush()
    assert uploader.run_id is not None
    return SyncResult(uploader.uri, uploader.run_id, num_metrics)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_dir", type=Path, help="run directory to send")
    parser.add_argument("--uri", help="MLflow store (default: the run's own)")
    parser.add_argument("--all", action="store_true", help="send every record again, not only the missing ones")


def run(args: argparse.Namespace) -> int:
    """The verb; returns an exit code."""
    try:
        result = sync(args.run_dir, args.uri, everything=args.all)
    except ValueError as error:
        print(f"pretrain sync: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever a store may raise: for the user it is one line, not a trace
        reason = redact_url(f"{type(error).__name__}: {error}")
        print(f"pretrain sync: MLflow did not take it: {reason}\nNothing is lost; try again.", file=sys.stderr)
        return 1
    print(f"sent {result.num_metrics} metric values to run {result.run_id} at {redact_url(result.uri)}")
    return 0
