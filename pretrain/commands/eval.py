"""``pretrain eval``: tasks of EleutherAI's lm-evaluation-harness on a checkpoint, in one process, without a network."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config
    from pretrain.evaluation.subject import Subject

_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="run directory, one of its checkpoints, or a folder written by `pretrain import`"
    )
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between them")
    parser.add_argument(
        "--include", required=True, type=Path, nargs="+", metavar="PATH", help="folders with the tasks' YAML files"
    )
    parser.add_argument("--limit", type=int, help="first documents of each task only (for a quick look)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences read together (default: %(default)s)")
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens that the model reads at most (default: model.max_sequence_length, else data.sequence_length)",
    )
    parser.add_argument("--checkpoint", help="step or folder name of a run's checkpoint (default: latest)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use in place of the data set's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--out", type=Path, help="new JSON file for the results (default: a numbered one in artifacts/ of the run)"
    )


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoint.store import verify
    from pretrain.evaluation.subject import find_subject, save_results

    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    _check_arguments(arguments, tasks)
    subject = find_subject(arguments.source, arguments.checkpoint)
    verify(subject.checkpoint)
    # Before anything of the harness is imported, which reads them: tasks and their data are local files.
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    harness = _import_harness()
    length = subject.max_length(arguments.max_length)
    tokenizer = arguments.tokenizer or subject.tokenizer()
    model = _load(subject, arguments.device)
    adapter = harness.HarnessLM(model, tokenizer, batch_size=arguments.batch_size, max_length=length, seed=subject.seed)
    record = harness.run_tasks(adapter, tasks, arguments.include, arguments.limit)
    step = _step_of(subject.checkpoint)
    facts = {
        "checkpoint": str(subject.checkpoint),
        "step": step,
        "tasks": tasks,
        "max_length": length,
        "limit": arguments.limit,
        "tokenizer": str(tokenizer),
    }
    text = json.dumps(facts | {"harness": record}, indent=1, default=str) + "\n"
    out = save_results(subject, arguments.out, text)
    rows = figures(record)
    _print_table(rows, subject.checkpoint)
    if subject.run is not None and subject.config is not None:
        _record(subject.run, subject.config, step, rows, out)
    print(f"written: {out}")
    return 0


def figures(record: dict[str, Any]) -> list[tuple[str, str, str, float, float | None]]:
    """(task, metric, filter, value, standard error or None) of every number in the harness's record."""
    rows = []
    for task, values in record["results"].items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if metric.endswith("_stderr") or not chosen or isinstance(value, str | bool):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            is_number = isinstance(error, int | float) and not isinstance(error, bool)
            rows.append((task, metric, chosen, float(value), float(error) if is_number else None))
    return rows


def _check_arguments(arguments: argparse.Namespace, tasks: list[str]) -> None:
    """Raises ValueError naming all that is wrong with the arguments."""
    faults = []
    if not tasks:
        faults.append("--tasks: names no task; give one or more, with commas between them")
    for name in ("limit", "batch_size", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            faults.append(f"--{name.replace('_', '-')}: found {value}, expected 1 or more")
    for folder in arguments.include:
        if not folder.is_dir():
            faults.append(f"--include: {folder} is no folder; give the folder that holds the tasks' YAML files")
    if arguments.tokenizer is not None and not arguments.tokenizer.is_file():
        faults.append(f"--tokenizer: {arguments.tokenizer} is no file; give a tokenizer.json")
    out: Path | None = arguments.out
    if out is not None and (out.exists() or out.is_symlink()):
        faults.append(
            f"--out: {out} is there already and is not overwritten; choose another name, move it away, or leave out "
            "--out for a file of its own"
        )
    if faults:
        raise ValueError("\n".join(faults))


def _import_harness() -> Any:
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"pretrain eval needs lm-evaluation-harness, which cannot be imported here ({error}); install it with "
            "`pip install 'pretrain[eval]'`"
        ) from error
    from pretrain.evaluation import harness

    return harness


def _load(subject: Subject, device: str | None) -> Any:
    """The model with its weights, where it shall run."""
    import torch

    from pretrain.checkpoint.reader import CheckpointReader, load_weights
    from pretrain.config.components import build_component
    from pretrain.parallel.layers import TorchLayers

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    model = build_component(subject.model, layers=TorchLayers())
    load_weights(model, CheckpointReader(subject.checkpoint))
    return model.to(wanted).eval()


def _step_of(folder: Path) -> int:
    from pretrain.checkpoint.reader import CheckpointReader

    return int(CheckpointReader(folder).manifest.step)


def _print_table(rows: list[tuple[str, str, str, float, float | None]], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"lm-evaluation-harness on {folder.name}", title_justify="left")
    for name in ("task", "metric", "filter", "value", "standard error"):
        table.add_column(name, justify="right" if name in ("value", "standard error") else "left")
    for task, metric, chosen, value, error in rows:
        table.add_row(task, metric, chosen, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(table)


def _record(
    run: RunDir, config: Config, step: int, rows: list[tuple[str, str, str, float, float | None]], out: Path
) -> None:
    """The figures, with the file they are from, in ``metrics.jsonl`` and, where the run is tracked, in MLflow."""
    from pretrain.tracking.metrics_log import MetricsLog, read_records

    try:
        attempt = max((record.get("attempt", 0) for record in read_records(run.metrics_path)), default=0)
    except FileNotFoundError:
        attempt = 0
    metrics = {
        f"{task}/{metric}" + ("" if chosen == "none" else f"/{chosen}"): value
        for task, metric, chosen, value, _ in rows
    }
    with MetricsLog(run.metrics_path, attempt) as log:
        log.write("harness", step=step, metrics=metrics, file=str(out.absolute()))
    if not config.tracking.enabled:
        return
    from pretrain.tracking.sync import sync

    try:
        sync(run.path)
    except Exception as error:  # The figures are safe in the run's own record.
        print(
            f"pretrain: MLflow could not be told ({error}); later: pretrain tracking sync {run.path}", file=sys.stderr
        )
