"""``pretrain status RUN``: one page on a run: its state, attempts, ranks, checkpoints, and what to do next."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.watch.attempts import Attempt
    from launchers.watch.details import Beat, RunDetails
    from launchers.watch.summary import RunSummary

_MAX_RANKS = 16
_MAX_ATTEMPTS = 8
_SILENT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pretrain.commands.watching import add_run_arguments

    add_run_arguments(parser)
    parser.add_argument("--ranks", action="store_true", help=f"every rank, also where there are more than {_MAX_RANKS}")
    parser.add_argument("--json", action="store_true", help="everything that is known, as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.commands.watching import guarded

    return guarded(lambda: _status(arguments))


def _status(arguments: argparse.Namespace) -> int:
    from launchers.exit_codes import ExitCode
    from launchers.watch.details import read_details
    from launchers.watch.find import resolve_run
    from launchers.watch.summary import summarise_one
    from pretrain.commands import watching

    summary, slurm_fault = summarise_one(resolve_run(arguments.run, arguments.root))
    details = read_details(summary)
    if arguments.json:
        watching.print_json(watching.plain_json(summary) | {"details": watching.plain_json(details)})
        return ExitCode.FINISHED
    now = time.time()
    _print_facts(summary, details, now)
    _print_attempts(summary.attempts)
    _print_ranks(details.beats, now, everything=arguments.ranks)
    _print_bad_steps(details)
    _print_next(summary)
    if slurm_fault is not None:
        watching.warn(f"Slurm could not be asked: {slurm_fault}")
    for fault in dict.fromkeys([*summary.faults, *details.faults]):
        watching.warn(f"cannot be read: {fault}")
    return ExitCode.FINISHED


def _print_facts(summary: RunSummary, details: RunDetails, now: float) -> None:
    from rich.table import Table
    from rich.text import Text

    from pretrain.commands.launch import shown
    from pretrain.commands.watching import STYLES, is_terminal, make_console

    rows: list[tuple[str, str]] = [
        ("state", _state(summary, now)),
        ("progress", _progress(summary, now)),
        ("training", _training(summary)),
        ("job", _job(summary, now)),
        ("last exit", _last_exit(summary)),
        ("restarts", _restarts(summary, details)),
        ("checkpoints", _checkpoints(details, now)),
        ("MLflow run", details.mlflow or ""),
        ("directory", shown(summary.path)),
        ("log", shown(log) if (log := details.supervisor_log or details.rank_log) is not None else ""),
        *(("report", shown(report)) for report in details.reports),
    ]
    console = make_console()
    console.print(Text(summary.name, style="bold"))
    if not is_terminal():
        for label, value in rows:
            if value:
                print(f"  {label:<11}  {' '.join(value.split())}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        if value:
            table.add_row("  " + label, Text(value, style=STYLES.get(summary.state, "") if label == "state" else ""))
    console.print(table)


def _state(summary: RunSummary, now: float) -> str:
    from pretrain.commands.watching import age

    words = str(summary.state)
    if summary.phase is not None:
        words += f" ({summary.phase})"
    if summary.note:
        words += f": {summary.note}"
    ended = not summary.is_active and summary.state != "lost"
    when = summary.moved if ended else summary.heard
    if when is None:
        return words
    return f"{words}; {'ended' if ended else 'last sign of life'} {age(when, now)} ago"


def _progress(summary: RunSummary, now: float) -> str:
    from pretrain.commands.watching import progress, short_duration

    if summary.step is None and summary.steps is None:
        return ""
    words = f"step {progress(summary)}"
    if summary.step is not None and summary.steps:
        words += f" ({100 * summary.step / summary.steps:.1f}%)"
    if summary.eta_s is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(now + min(summary.eta_s, 1e9)))
        words += f", {short_duration(summary.eta_s)} to go, until {end}"
    if summary.pace_s is not None:
        words += f", {summary.pace_s:.3g} s a step"
    return words


def _training(summary: RunSummary) -> str:
    from pretrain.commands.watching import short_count, short_loss

    words = []
    if summary.loss is not None:
        words.append(f"loss {short_loss(summary.loss)}")
    if summary.validation_loss is not None:
        words.append(f"validation {short_loss(summary.validation_loss)}")
    if summary.grad_norm is not None:
        words.append(f"grad norm {summary.grad_norm:.3g}")
    if summary.learning_rate is not None:
        words.append(f"lr {summary.learning_rate:.2e}")
    if summary.tokens_per_s is not None:
        words.append(f"{short_count(summary.tokens_per_s)} tokens/s")
    if summary.tokens is not None:
        words.append(f"{short_count(summary.tokens)} tokens")
    return ", ".join(words)


def _job(summary: RunSummary, now: float) -> str:
    from pretrain.commands.watching import short_duration

    if summary.job is None:
        return ""
    words = summary.job
    view = summary.job_view
    if view is not None:
        words += f" {view.state}" + (f" ({view.reason})" if view.reason else "")
        words += f" on {view.nodes}" if view.nodes else ""
        if view.is_active and view.end is not None and view.end > now:
            words += f", {short_duration(view.end - now)} of its time left"
    elif summary.state == "lost":
        words += _fate(summary.job)
    return words + (f", {summary.num_processes} processes" if summary.num_processes is not None else "")


def _fate(job: str) -> str:
    """What the controller or the accounting still knows of a job that has left the queue."""
    from launchers.slurm.commands import Slurm, SlurmError

    try:
        info = Slurm(timeout_s=15.0).job(int(job))
    except (SlurmError, ValueError):
        return ""
    if info is None:
        return " (Slurm has forgotten it)"
    when = f" at {time.strftime('%m-%d %H:%M:%S', time.localtime(info.end_time))}" if info.end_time is not None else ""
    return f" {info.state}{when}, exit code {info.exit_code}"


def _last_exit(summary: RunSummary) -> str:
    if summary.exit_class is None:
        return ""
    action = f", then {summary.action}" if summary.action is not None else ""
    # The state's own note says it already where the run ended so.
    reason = f": {summary.reason}" if summary.reason and summary.reason != summary.note else ""
    return f"{summary.exit_class}{action}{reason}"


def _restarts(summary: RunSummary, details: RunDetails) -> str:
    if not summary.attempts:
        return ""
    most = f" (at most {details.max_restarts} after faults)" if details.max_restarts is not None else ""
    count = len(summary.attempts)
    return f"{summary.restarts}{most}; {count} attempt{'s' if count > 1 else ''} in all"


def _checkpoints(details: RunDetails, now: float) -> str:
    from pretrain.commands.watching import age, short_bytes

    if not details.checkpoints:
        return "none yet"
    words = f"{len(details.checkpoints)}, the last of step {details.checkpoints[-1]}"
    save = details.last_save
    if save is not None and save.step == details.checkpoints[-1]:
        words += f", {age(save.time, now)} ago" if save.time is not None else ""
        words += f", written in {save.seconds:.1f} s" if save.seconds is not None else ""
        words += f", {short_bytes(save.num_bytes)}" if save.num_bytes is not None else ""
    return words


def _print_attempts(attempts: tuple[Attempt, ...]) -> None:
    from pretrain.commands.watching import print_table, short_duration, short_nodes

    if not attempts:
        return
    rows = []
    for attempt in attempts[-_MAX_ATTEMPTS:]:
        took = None
        if attempt.started is not None and attempt.ended is not None:
            took = attempt.ended - attempt.started
        steps = "-"
        if attempt.first_step is not None or attempt.last_step is not None:
            steps = f"{_known(attempt.first_step)}..{_known(attempt.last_step)}"
        began = "-"
        if attempt.started is not None:
            began = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.started))
        rows.append(
            [
                str(attempt.number),
                began,
                short_duration(took),
                attempt.job or "-",
                short_nodes(attempt.nodes),
                _known(attempt.num_processes),
                steps,
                _known(attempt.saved_step),
                attempt.exit_class or "-",
                _culprit(attempt),
                attempt.action or "-",
            ]
        )
    print()
    if len(attempts) > _MAX_ATTEMPTS:
        print(f"the last {_MAX_ATTEMPTS} of {len(attempts)} attempts")
    headers = ("#", "began", "took", "job", "nodes", "ranks", "steps", "saved", "ended", "fault", "then")
    print_table(headers, rows, right=("#", "took", "ranks", "saved"), foldable=("nodes", "fault"))


def _culprit(attempt: Attempt) -> str:
    words = [f"rank {attempt.rank}"] if attempt.rank is not None else []
    words += [attempt.node] if attempt.node is not None else []
    return " ".join(words) or "-"


def _known(value: Any) -> str:
    return "-" if value is None else str(value)


def _print_ranks(beats: tuple[Beat, ...], now: float, *, everything: bool) -> None:
    from pretrain.commands.watching import age, print_table, short_duration

    if not beats:
        return
    print()
    chosen = list(beats)
    if len(beats) > _MAX_RANKS and not everything:
        # Who differs from the many is what one looks for.
        phases = Counter((beat.phase, beat.step) for beat in beats)
        print(f"{len(beats)} ranks: " + ", ".join(f"{count} in {_where(*key)}" for key, count in phases.most_common(4)))
        commonest = phases.most_common(1)[0][0]
        latest = max((beat.time for beat in beats if beat.time is not None), default=0.0)
        chosen = [
            beat
            for beat in beats
            if (beat.phase, beat.step) != commonest or beat.time is None or beat.time < latest - _SILENT_S
        ][:_MAX_RANKS]
        if not chosen:
            return
        print("those that differ or fell silent (--ranks shows all):")
    rows = [
        [
            str(beat.rank),
            beat.node or "-",
            _known(beat.step),
            " ".join(filter(None, (beat.phase, f"({beat.detail})" if beat.detail else None))) or "-",
            short_duration(max(0.0, now - beat.phase_since)) if beat.phase_since is not None else "-",
            beat.collective or "-",
            beat.stopping or "-",
            age(beat.time, now),
        ]
        for beat in chosen
    ]
    headers = ("rank", "node", "step", "phase", "for", "collective", "stopping", "heard")
    print_table(headers, rows, right=("rank", "step", "for", "heard"), foldable=("node", "phase"))


def _where(phase: str | None, step: int | None) -> str:
    return f"{phase or '-'}" + (f" after step {step}" if step is not None else "")


def _print_bad_steps(details: RunDetails) -> None:
    from pretrain.commands.watching import print_table, short_loss

    if not details.bad_steps:
        return
    print(f"\nbad steps: {details.num_bad_steps}")
    rows = [
        [_known(b.step), b.kind or "-", b.action or "-", short_loss(b.loss), short_loss(b.grad_norm)]
        for b in details.bad_steps
    ]
    print_table(("step", "what", "done", "loss", "grad norm"), rows, right=("step", "loss", "grad norm"))


def _print_next(summary: RunSummary) -> None:
    from launchers.watch.state import State
    from pretrain.commands.launch import program, shown

    here = shown(summary.path)
    commands: list[str] = []
    if summary.is_active:
        commands = [f"logs -f {here}", f"cancel {here}"]
    elif summary.state == State.FINISHED:
        commands = [f"report {here}"]
    elif summary.state == State.CREATED:
        commands = [f"resume {here}"]
    else:
        rank = summary.attempts[-1].rank if summary.attempts else None
        commands = [f"logs {here}" + (f" --rank {rank}" if rank is not None else ""), f"resume {here}"]
    print("\n" + "\n".join(f"  {program()} {command}" for command in commands))
