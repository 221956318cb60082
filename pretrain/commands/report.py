"""``pretrain report``: the summary of a run, as printed at its end."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from pretrain.commands.launch import program, shown
from pretrain.training.report import BASELINES

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="run directory of a finished run")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    from launchers.run_dir import RunDir
    from pretrain.config.check import check

    run_dir = RunDir.open(arguments.run_dir)
    config = check(run_dir.config())
    if not is_reported(run_dir, config.train.steps):
        raise ValueError(f"{run_dir.path} has not finished; continue it with `pretrain resume {arguments.run_dir}`")
    print_report(run_dir, config)
    return 0


def is_reported(run: RunDir, steps: int) -> bool:
    """Whether a run of ``steps`` steps has come to its end, report included."""
    try:
        summary = json.loads((run.artifacts_path / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(summary.get("completed_steps") == steps)


def print_report(run: RunDir, config: Config) -> None:
    """Print the figures in ``artifacts/summary.json``, where things are, and what to try next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pretrain.checkpoint.store import CheckpointStore

    summary: dict[str, Any] = json.loads((run.artifacts_path / "summary.json").read_text())
    here = shown(run.path)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    table = Table(title=f"Finished: {config.run.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    if "steps" in summary:
        table.add_row("steps, tokens", f"{summary['steps']:,} steps, {summary['tokens']:,.0f} target tokens")
        table.add_row(
            "training loss", f"{summary['loss_start']:.3f} at the start, {summary['loss_end']:.3f} at the end"
        )
    if "validation_loss" in summary:
        table.add_row("validation loss", _described(summary, "validation_"))
    for row, part in enumerate(_parts(summary)):
        table.add_row("of its parts" if row == 0 else "", f"{part}: {_described(summary, f'validation/{part}/')}")
    for row, (label, value) in enumerate(_bits_per_byte(summary)):
        table.add_row("held-out text" if row == 0 else "", f"{value:.3f} bits per byte, {label}")
    if "tokens_per_s" in summary:
        table.add_row("throughput", f"{summary['tokens_per_s']:,.0f} tokens/s (median step)")
    table.add_row("run directory", here)
    latest = CheckpointStore(run.checkpoints_path).latest()
    if latest is not None:
        table.add_row("checkpoint", os.path.relpath(latest))
    table.add_row("MLflow run", _mlflow_run(run))
    console.print(table)
    for sample in summary.get("samples", [])[:1]:
        console.print("\nA sample of generated text (the prompt is underlined):")
        console.print(Text.assemble((sample["prompt"], "underline"), sample["text"]))
    more = summary.get("steps", config.train.steps) * 3
    console.print("\nNext:")
    commands = [f"resume {here} train.steps={more}"]
    if summary.get("samples"):
        commands.append(f"generate {here} --prompt 'def main'")
    if config.tracking.enabled:
        commands.append("ui")
    commands += [f"checkpoint verify {here}", "config check experiment=demo model.attention.num_heads=7 train.stepz=9"]
    for command in commands:
        console.print(f"  {program()} {command}", soft_wrap=True)


def _described(summary: dict[str, Any], prefix: str) -> str:
    """Figures of the validation split or of one part of it, as far as there are."""
    words = [f"{summary[prefix + 'loss']:.3f} nats per token"]
    if prefix + "perplexity" in summary:
        words.append(f"perplexity {float(summary[prefix + 'perplexity']):,.2f}")
    if prefix != "validation_" and prefix + "bits_per_byte" in summary:
        words.append(f"{summary[prefix + 'bits_per_byte']:.3f} bits per byte")
    for name, label in (("accuracy", "accuracy"), ("exact_match", "exact match")):
        if prefix + name in summary:
            words.append(f"{label} {summary[prefix + name]:.1%}")
    return ", ".join(words)


def _parts(summary: dict[str, Any]) -> list[str]:
    """Names of the parts of the validation split that were reported, in their order."""
    named = [name.split("/") for name in summary if name.startswith("validation/") and name.endswith("/loss")]
    return ["/".join(words[1:-1]) for words in named]


def _bits_per_byte(summary: dict[str, Any]) -> list[tuple[str, float]]:
    rows = []
    if "validation_bits_per_byte" in summary:
        rows.append(("this model", summary["validation_bits_per_byte"]))
    return rows + [(BASELINES.get(name, name), value) for name, value in summary.get("baselines", {}).items()]


def _mlflow_run(run: RunDir) -> str:
    try:
        facts = json.loads(run.mlflow_path.read_text())
        if facts["run_id"] is None:
            return f"not yet on {facts['uri']}: send it with `{program()} sync {os.path.relpath(run.path)}`"
        return f"{facts['run_id']} in {facts['uri']}"
    except (OSError, ValueError, KeyError):
        return "not tracked"
