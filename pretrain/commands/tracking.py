"""``pretrain tracking sync|status RUN``: sends to MLflow what is missing there, or shows how much that is."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from pretrain.commands.watching import add_run_arguments

    actions = parser.add_subparsers(dest="action", required=True, metavar="{sync,status}")
    sync = actions.add_parser("sync", help="send what MLflow lacks, as after an outage; safe to repeat and at any time")
    add_run_arguments(sync)
    sync.add_argument("--uri", help="MLflow store (default: the run's own)")
    sync.add_argument("--all", action="store_true", help="send every record again, not only the missing ones")
    status = actions.add_parser(
        "status", help="where the run is tracked, and what has not arrived there; sends nothing"
    )
    add_run_arguments(status)


def run(arguments: argparse.Namespace) -> int:
    """The verb; returns an exit code."""
    return _sync(arguments) if arguments.action == "sync" else _status(arguments)


def _sync(arguments: argparse.Namespace) -> int:
    from launchers.watch.find import resolve_run
    from pretrain.tracking.run_files import redact_url
    from pretrain.tracking.store import passes_by_itself
    from pretrain.tracking.sync import sync
    from pretrain.tracking.uploader import ArtifactsError

    try:
        run_path = resolve_run(arguments.run, arguments.root)
        result = sync(run_path, arguments.uri, everything=arguments.all)
    except ValueError as error:
        print(f"pretrain tracking sync: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever a store may raise: for the user it is one line, not a trace
        reason = redact_url(f"{type(error).__name__}: {error}").split("\n")[0]
        kept = f"Nothing is lost: {run_path} keeps it. "
        if passes_by_itself(error.__cause__ if isinstance(error, ArtifactsError) and error.__cause__ else error):
            advice = "Try again later."
        else:
            advice = "Trying again alone does not help: mend first what is named above (address, credentials, rights)."
        what = "MLflow has all values, but" if isinstance(error, ArtifactsError) else "MLflow did not take it:"
        print(f"pretrain tracking sync: {what} {reason}\n{kept}{advice}", file=sys.stderr)
        return 1
    print(f"sent {result.num_metrics} metric values to run {result.run_id} at {redact_url(result.uri)}\n{result.link}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from launchers.watch.find import resolve_run
    from pretrain.commands.launch import shown
    from pretrain.tracking.run_files import redact_url
    from pretrain.tracking.spool import Spool
    from pretrain.tracking.store import resolve_uri
    from pretrain.tracking.sync import tracking_link, tracking_of

    try:
        run_path = resolve_run(arguments.run, arguments.root)
        tracking, link = tracking_of(run_path), tracking_link(run_path)
    except ValueError as error:
        print(f"pretrain tracking status: {error}", file=sys.stderr)
        return 2
    uri = resolve_uri(tracking)
    spool = Spool(run_path, uri)
    print(f"store     {redact_url(uri)}" + ("" if tracking.enabled else "  (tracking.enabled is false)"))
    print(f"run       {spool.state['run_id'] or 'not there yet'}  {spool.state['status'] or ''}".rstrip())
    missing = spool.missing()
    if not missing:
        print("missing   nothing")
    else:
        print(f"missing   {', '.join(missing)}; send: pretrain tracking sync {shown(run_path)}")
    if link:
        print(f"see       {link}")
    return 0
