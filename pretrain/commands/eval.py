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

_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
_DEFAULT_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run directory, or the folder of one of its checkpoints")
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
    parser.add_argument("--checkpoint", help="step or folder name (default: latest)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use in place of the data set's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, help="JSON file of the results (default: in artifacts/ of the run)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.manifest import CheckpointError
    from pretrain.checkpoint.store import CheckpointStore, verify
    from pretrain.config.check import check

    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    _check_arguments(arguments, tasks)
    path, checkpoint = _split_source(arguments.source, arguments.checkpoint)
    run_dir = RunDir.open(path)
    config = check(run_dir.config())
    folder = CheckpointStore(run_dir.checkpoints_path).select(checkpoint)
    if folder is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint yet; train it with `pretrain resume`")
    verify(folder)
    # Before anything of the harness is imported, which reads them: tasks and their data are local files.
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    harness = _import_harness()
    model, tokenizer, length = _load(config, folder, arguments)
    adapter = harness.HarnessLM(
        model, tokenizer, batch_size=arguments.batch_size, max_length=length, seed=config.run.seed
    )
    record = harness.run_tasks(adapter, tasks, arguments.include, arguments.limit)
    step = _step_of(folder)
    facts = {
        "checkpoint": str(folder),
        "step": step,
        "tasks": tasks,
        "max_length": length,
        "limit": arguments.limit,
        "tokenizer": str(tokenizer),
    }
    out = arguments.out or run_dir.artifacts_path / f"eval_{folder.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    from pretrain.config.files import atomic_write_text

    atomic_write_text(out, json.dumps(facts | {"harness": record}, indent=1, default=str) + "\n")
    rows = figures(record)
    _print_table(rows, folder)
    _record(run_dir, config, step, rows)
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
    if faults:
        raise ValueError("\n".join(faults))


def _split_source(source: Path, checkpoint: str | None) -> tuple[Path, str | None]:
    """Run directory and checkpoint of a source that may be either; raises ValueError where both name a checkpoint."""
    source = source.absolute()
    if source.parent.name != "checkpoints":
        return source, checkpoint
    if checkpoint is not None:
        raise ValueError(f"--checkpoint {checkpoint}: {source} is a checkpoint already; leave out one of the two")
    return source.parent.parent, source.name


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


def _load(config: Config, folder: Path, arguments: argparse.Namespace) -> tuple[Any, Path, int]:
    """The model with its weights, the tokenizer's file, and how many tokens the model reads at most."""
    import torch

    from pretrain.checkpoint.reader import CheckpointReader, load_weights
    from pretrain.config.components import build_component
    from pretrain.parallel.layers import TorchLayers

    tokenizer = arguments.tokenizer
    if tokenizer is None:
        tokenizer = build_component(config.data, seed=config.run.seed).tokenizer_path
    if tokenizer is None:
        raise ValueError("the run's data source has no tokenizer, which the harness needs; name one with --tokenizer")
    model = build_component(config.model, layers=TorchLayers())
    load_weights(model, CheckpointReader(folder))
    wanted = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    longest = getattr(config.model, "max_sequence_length", None)
    length = arguments.max_length or longest or getattr(config.data, "sequence_length", None) or _DEFAULT_LENGTH
    if longest is not None and length > longest:
        raise ValueError(f"--max-length: found {length}, the model reads at most {longest} (max_sequence_length)")
    return model.to(wanted).eval(), Path(tokenizer), int(length)


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


def _record(run: RunDir, config: Config, step: int, rows: list[tuple[str, str, str, float, float | None]]) -> None:
    """The figures in ``metrics.jsonl`` and, where the run is tracked, in MLflow."""
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
        log.write("harness", step=step, metrics=metrics)
    if not config.tracking.enabled:
        return
    from pretrain.tracking.sync import sync

    try:
        sync(run.path)
    except Exception as error:  # The figures are safe in the run's own record.
        print(f"pretrain: MLflow could not be told ({error}); later: pretrain sync {run.path}", file=sys.stderr)
