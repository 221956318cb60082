"""End-of-run report: what the run reached, beside simple baselines on the same held-out text."""

from __future__ import annotations

import json
import logging
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.schema import Config

logger = logging.getLogger("pretrain")

# What a data component's baselines are called in reports and pictures.
BASELINES = {"bigram_bits_per_byte": "token bigram model", "xz_bits_per_byte": "xz -9e"}


def write_report(run: RunDir, config: Config) -> dict[str, Any]:
    """Collect the figures of a finished run and write ``artifacts/summary.json`` and ``artifacts/loss_curve.png``."""
    from pretrain.config.files import atomic_write_text
    from pretrain.tracking.metrics_log import effective_records, read_records
    from pretrain.tracking.plots import plot_loss_curve

    records = effective_records(read_records(run.metrics_path))
    summary = {"completed_steps": config.train.steps, **summarise(records)}
    baselines = getattr(config.data, "baselines", None)
    if callable(baselines) and "validation_bits_per_byte" in summary:
        try:
            summary["baselines"] = baselines()
        except (ValueError, OSError) as error:  # A finished run must not fail for what it is compared with.
            logger.warning("the report goes without baselines: %s", error)
    summary["samples"] = [
        {"prompt": record["prompt"], "text": record["text"]}
        for record in records
        if record["event"] == "sample" and record["step"] == config.train.steps
    ]
    run.artifacts_path.mkdir(exist_ok=True)
    atomic_write_text(run.artifacts_path / "summary.json", json.dumps(summary, indent=1) + "\n")
    if summary["samples"]:
        text = "\n".join(f"--- {s['prompt']!r}\n{s['prompt']}{s['text']}\n" for s in summary["samples"])
        atomic_write_text(run.artifacts_path / "samples.txt", text)
    labelled = {BASELINES.get(name, name): value for name, value in summary.get("baselines", {}).items()}
    plot_loss_curve(records, run.artifacts_path / "loss_curve.png", baselines=labelled)
    return summary


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a run from its metrics records (attempts already merged)."""
    train = [record for record in records if record["event"] == "train"]
    evals = [record for record in records if record["event"] == "eval"]
    summary: dict[str, Any] = {}
    if train:
        # Single steps are noisy on small batches: the end is a mean, the start is the first step, before any update.
        tail = [record for record in train if record["step"] > train[-1]["step"] - 10]
        summary |= {
            "steps": train[-1]["step"],
            "tokens": train[-1]["metrics"]["tokens"],
            "loss_start": train[0]["metrics"]["loss"],
            "loss_end": statistics.fmean(record["metrics"]["loss"] for record in tail),
            "tokens_per_s": statistics.median(record["metrics"]["tokens_per_s"] for record in train),
        }
    if evals:
        summary |= evals[-1]["metrics"]
    return summary
