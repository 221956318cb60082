"""``pretrain tracking sync|status RUN``: sends to MLflow what is missing there, or shows how much that is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{sync,status}")
    sync = actions.add_parser("sync", help="send what MLflow lacks, as after an outage; safe to repeat and at any time")
    sync.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    sync.add_argument("--uri", help="MLflow store (default: the run's own)")
    sync.add_argument("--all", action="store_true", help="send every record again, not only the missing ones")
    status = actions.add_parser(
        "status", help="where the run is tracked, and what has not arrived there; sends nothing"
    )
    status.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")


def run(arguments: argparse.Namespace) -> int:
    """The verb; returns an exit code."""
    return _sync(arguments) if arguments.action == "sync" else _status(arguments.run_dir)


def _sync(arguments: argparse.Namespace) -> int:
    from pretrain.tracking.run_files import redact_url
    from pretrain.tracking.sync import sync

    try:
        result = sync(arguments.run_dir, arguments.uri, everything=arguments.all)
    except ValueError as error:
        print(f"pretrain tracking sync: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever a store may raise: for the user it is one line, not a trace
        reason = redact_url(f"{type(error).__name__}: {error}").split("\n")[0]
        print(f"pretrain tracking sync: MLflow did not take it: {reason}\nNothing is lost; try again.", file=sys.stderr)
        return 1
    print(f"sent {result.num_metrics} metric values to run {result.run_id} at {redact_url(result.uri)}\n{result.link}")
    return 0


def _status(run_dir: Path) -> int:
    from pretrain.tracking.run_files import redact_url
    from pretrain.tracking.spool import Spool
    from pretrain.tracking.store import resolve_uri
    from pretrain.tracking.sync import tracking_link, tracking_of

    run_path = run_dir.absolute()
    try:
        tracking, link = tracking_of(run_path), tracking_link(run_path)
    except ValueError as error:
        print(f"pretrain tracking status: {error}", file=sys.stderr)
        return 2
    uri = resolve_uri(tracking)
    spool = Spool(run_path, uri)
    print(f"store     {redact_url(uri)}" + ("" if tracking.enabled else "  (tracking.enabled is false)"))
    print(f"run       {spool.state['run_id'] or 'not there yet'}  {spool.state['status'] or ''}".rstrip())
    if spool.is_delivered():
        print("missing   nothing")
    else:
        print(f"missing   {spool.undelivered_bytes():,} bytes of records; send: pretrain tracking sync {run_dir}")
    if link:
        print(f"see       {link}")
    return 0
