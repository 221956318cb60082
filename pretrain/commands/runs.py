"""``pretrain runs``: the runs below a folder, from their directories alone: state, step, loss, speed, restarts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.watch.summary import RunSummary

_HEADERS = ("run", "state", "step", "loss", "tok/s", "eta", "restarts", "last exit", "job", "idle")
_RIGHT = ("step", "loss", "tok/s", "eta", "restarts", "idle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", nargs="?", default="runs", help="folder that holds run directories (default: runs)")
    parser.add_argument("--active", action="store_true", help="only runs that wait, start or run")
    parser.add_argument(
        "-n", "--last", type=int, default=30, help="so many, active ones first, then the latest; 0: all (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="everything that is known, as a JSON list")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.commands.watching import guarded

    return guarded(lambda: _runs(arguments))


def _runs(arguments: argparse.Namespace) -> int:
    import time

    from launchers.exit_codes import ExitCode
    from launchers.watch.find import find_runs
    from launchers.watch.summary import summarise_all
    from pretrain.commands import watching

    root = Path(arguments.root)
    summaries, fault = summarise_all(find_runs(root))
    # Active runs first: one that has waited for long in the queue must not fall off the end.
    summaries.sort(key=lambda summary: (summary.is_active, summary.moved or 0.0, summary.name), reverse=True)
    chosen = [summary for summary in summaries if summary.is_active or not arguments.active]
    shown = chosen[: arguments.last] if arguments.last > 0 else chosen
    if arguments.json:
        watching.print_json(shown)
        return ExitCode.FINISHED
    if not shown:
        some = f"no {'active ' if arguments.active else ''}runs in {root}"
        print(some + (f" ({len(summaries)} that are not active)" if summaries else ""))
        return ExitCode.FINISHED
    now = time.time()
    watching.print_table(_HEADERS, [_row(summary, now) for summary in shown], right=_RIGHT, foldable=("run",))
    if len(shown) < len(chosen):
        watching.warn(f"{len(chosen) - len(shown)} older runs are not shown (-n 0 shows all)")
    if fault is not None:
        watching.warn(f"Slurm could not be asked: {fault}")
    damaged = [summary.name for summary in shown if summary.faults]
    if damaged:
        watching.warn(f"files that cannot be read in {', '.join(damaged)}; `pretrain status RUN` names them")
    return ExitCode.FINISHED


def _row(summary: RunSummary, now: float) -> list[str]:
    from pretrain.commands.watching import age, progress, short_count, short_duration, short_loss

    return [
        summary.name,
        str(summary.state),
        progress(summary),
        short_loss(summary.loss),
        short_count(summary.tokens_per_s),
        short_duration(summary.eta_s),
        str(summary.restarts),
        summary.exit_class or "-",
        summary.job or "-",
        age(summary.moved, now),
    ]
