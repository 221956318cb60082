"""Multi-query associative recall by a transformer, Mamba-2 and a hybrid of equal size, over equal steps.

    python benchmarks/recall.py [--work runs/recall] [--seeds 1 2 3] [--report]

Every run is ``pretrain run experiment=mqar`` with the overrides below, one process with one thread. Runs that are
finished are not repeated, runs that were interrupted go on; ``--report`` only reads them. A run is one of the whole
configuration, as composed: where any file of it has changed, there will be another run. All runs are reported, each
with its accuracy over steps, in ``results/recall.json``, ``results/recall.md`` and ``results/recall.png``; while some
are missing, in ``results/recall_incomplete.*`` and without a verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results_file import RESULTS, write_result

from launchers.provenance import git_state
from pretrain.config.compose import load_run_config
from pretrain.config.freeze import config_digest, frozen_for_new_run, load

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "configs" / "experiment" / "mqar.yaml"

# Two layers that mix tokens in each; the MLPs (hidden sizes) make up for what attention has less than Mamba-2, so that
# parameters are equal to within 0.1%. Positions: RoPE where attention is alone; none in the hybrid, as in arXiv
# 2406.07887, where Mamba-2 tells the order.
ARCHITECTURES: dict[str, list[str]] = {
    "transformer": ["model.pattern='*-*-'", "model.attention.rope_theta=10000.0"],
    "hybrid": ["model.pattern='M*-'"],
    "mamba2": ["model.pattern='MM'"],
    # Controls, run last: the three above have the experiment's learning rate, 3e-3.
    "mamba2_slow": ["model.pattern='MM'", "optimizer.learning_rate=1.0e-3"],
    "mamba2_fast": ["model.pattern='MM'", "optimizer.learning_rate=1.0e-2"],
}
LABELS = {
    "transformer": "Transformer `*-*-`",
    "hybrid": "hybrid `M*-`",
    "mamba2": "Mamba-2 `MM`",
    "mamba2_slow": "Mamba-2 `MM`, learning rate 1e-3",
    "mamba2_fast": "Mamba-2 `MM`, learning rate 1e-2",
}
CONTROLS = ("mamba2_slow", "mamba2_fast")
COLOURS = {
    "transformer": "tab:blue",
    "hybrid": "tab:green",
    "mamba2": "tab:red",
    "mamba2_slow": "tab:orange",
    "mamba2_fast": "tab:purple",
}
SOLVED = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/recall"), help="folder of the run directories")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--report", action="store_true", help="start nothing: report the runs that are finished")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    main_runs = [(seed, name) for seed in arguments.seeds for name in ARCHITECTURES if name not in CONTROLS]
    runs, missing = [], []
    for seed, architecture in [*main_runs, *((seed, name) for seed in arguments.seeds for name in CONTROLS)]:
        path = run_folder(work, architecture, seed)
        if not arguments.report and not _is_finished(path):
            _train(architecture, seed, path)
        if _is_finished(path):
            runs.append({"architecture": architecture, "seed": seed, **read(path)})
            _tell(runs[-1])
        else:
            missing.append(f"{architecture}, seed {seed}")
    if not runs:
        raise SystemExit(f"no finished run of the present configuration in {work}")
    report(runs, missing)


def run_folder(work: Path, architecture: str, seed: int) -> Path:
    """The run directory below ``work`` that holds exactly this run, else where it shall be made."""
    tree = _composed(architecture, seed)
    name = f"{architecture}_seed{seed}"
    for path in sorted(work.glob(f"*/{name}")):
        if _frozen(path) == tree:
            return path
    return work / config_digest(tree)[:8] / name


def _composed(architecture: str, seed: int) -> dict[str, Any]:
    """The configuration that a run freezes, without where its records go."""
    return _without_places(frozen_for_new_run(load_run_config(_overrides(architecture, seed))[0]))


def _frozen(path: Path) -> dict[str, Any] | None:
    """The configuration that a run directory was made with; None where there is none that can be read."""
    try:
        return _without_places(load((path / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def _without_places(tree: dict[str, Any]) -> dict[str, Any]:
    del tree["run"]["root"], tree["tracking"]["store"]
    return tree


def _overrides(architecture: str, seed: int) -> list[str]:
    return ["experiment=mqar", *ARCHITECTURES[architecture], f"run.name=recall_{architecture}", f"run.seed={seed}"]


def report(runs: list[dict[str, Any]], missing: list[str]) -> None:
    """Write figures, table and picture of the runs, under another name while some are ``missing``."""
    parameters = {run["architecture"]: run["parameters"] for run in runs}
    largest, smallest = max(parameters.values()), min(parameters.values())
    assert largest / smallest < 1.001, f"parameters differ: {parameters}"
    figures = {
        "complete": not missing,
        "missing": missing,
        "git": _revision(git_state(ROOT)[0]),
        "experiment": EXPERIMENT.read_text(),
        "overrides": ARCHITECTURES,
        "parameters": parameters,
        "state_bytes": {name: _state_bytes(name) for name in parameters},
        "summary": {name: _summary(runs, name) for name in ARCHITECTURES if name in parameters},
        "runs": runs,
    }
    name = "recall_incomplete" if missing else "recall"
    write_result(name, figures)
    text = table(runs, missing)
    (RESULTS / f"{name}.md").write_text(text)
    plot(runs, missing, RESULTS / f"{name}.png")
    print(text)


def table(runs: list[dict[str, Any]], missing: list[str]) -> str:
    """Final accuracies as markdown: mean and every seed, by number of pairs; then how the outcome compares."""
    parts = list(runs[0]["accuracy"])
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        f"Share of values recalled after {runs[0]['steps']} steps: mean over seeds {', '.join(map(str, seeds))}, and "
        "each seed in brackets.",
        "",
        "| | parameters | state | " + " | ".join(part.replace("_", " ") for part in parts) + " | minutes |",
        "|---" * (len(parts) + 4) + "|",
    ]
    for name in ARCHITECTURES:
        own = [run for run in runs if run["architecture"] == name]
        if not own:
            continue
        cells = []
        for part in parts:
            final = [run["accuracy"][part][-1] for run in own]
            cells.append(f"{statistics.fmean(final):.3f} ({', '.join(f'{value:.3f}' for value in final)})")
        minutes = statistics.fmean(run["wall_s"] for run in own) / 60
        size = f"{own[0]['parameters']:,} | {_state_bytes(name) / 1024:.0f} KiB"
        lines.append(f"| {LABELS[name]} | {size} | " + " | ".join(cells) + f" | {minutes:.1f} |")
    note = "State: what generation keeps of a row of 64 tokens in fp32 (keys and values, or recurrent states)."
    if missing:
        count = f"{len(runs)} of {len(runs) + len(missing)} runs"
        lines = [f"**Incomplete: {count}.** Missing: {'; '.join(missing)}.", "", *lines]
    return "\n".join([*lines, "", note, "", *([] if missing else [*_verdict(runs), ""])])


def _verdict(runs: list[dict[str, Any]]) -> list[str]:
    """The literature's statement, and whether these runs agree with it."""
    hardest = list(runs[0]["accuracy"])[-1]
    final = {
        name: [run["accuracy"][hardest][-1] for run in runs if run["architecture"] == name] for name in ARCHITECTURES
    }
    lines = [
        "Literature (arXiv 2312.04927, 2406.07887): at a small size and budget attention and hybrids solve recall "
        "where pure state-space models do not yet.",
        "",
    ]
    for name, values in final.items():
        if values:
            solved = sum(value >= SOLVED for value in values)
            lines.append(
                f"- {LABELS[name]}: {solved} of {len(values)} seeds reach {SOLVED:.0%} with {hardest.replace('_', ' ')}"
            )
    with_attention = final["transformer"] + final["hybrid"]
    without = final["mamba2"] + [value for name in CONTROLS for value in final[name]]
    if without and with_attention:
        agrees = min(with_attention) >= SOLVED and max(without) < SOLVED
        lines += ["", f"These runs {'agree' if agrees else 'do not agree'} with that, seed by seed."]
    return lines


def plot(runs: list[dict[str, Any]], missing: list[str], path: Path) -> None:
    """Accuracy over steps by number of pairs: mean over seeds, the range between them shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(runs[0]["accuracy"])
    figure, axes = pyplot.subplots(
        1, len(parts), figsize=(4 * len(parts), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, part in zip(axes[0], parts, strict=True):
        for name in ARCHITECTURES:
            curves = [run["accuracy"][part] for run in runs if run["architecture"] == name]
            if not curves:
                continue
            steps = next(run["eval_steps"] for run in runs if run["architecture"] == name)
            columns = list(zip(*curves, strict=True))
            means = [statistics.fmean(column) for column in columns]
            axis.plot(steps, means, color=COLOURS[name], label=LABELS[name].replace("`", ""))
            axis.fill_between(
                steps, [min(c) for c in columns], [max(c) for c in columns], color=COLOURS[name], alpha=0.2, lw=0
            )
        axis.set(title=part.replace("_", " "), xlabel="optimizer step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("values recalled")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    seeds = len({run["seed"] for run in runs})
    size = runs[0]["parameters"]
    marked = f"INCOMPLETE ({len(missing)} runs missing): " if missing else ""
    title = f"Associative recall, {size / 1000:.0f} thousand parameters; mean and range of {seeds} seeds"
    figure.suptitle(marked + title)
    figure.savefig(path, dpi=130, metadata={"Software": ""})
    pyplot.close(figure)


def _train(architecture: str, seed: int, path: Path) -> None:
    if (path / "config.yaml").exists():
        words = ["resume", str(path)]
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ["run", "--run-dir", str(path), *_overrides(architecture, seed)]
    print(f"{architecture}, seed {seed}: pretrain {' '.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(path.parent / f"{path.name}.log", "a") as log:
        command = [sys.executable, "-m", "pretrain.cli", *words]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"{architecture}, seed {seed}: exit code {code}; see {path}.log")


def _state_bytes(architecture: str) -> int:
    """Bytes that generation keeps for one row, in fp32."""
    from pretrain.models.hybrid.cost import model_cost

    _, config = load_run_config(_overrides(architecture, 0))
    return int(model_cost(config.model, config.data.sequence_length, bytes_per_value=4).state_bytes)


def _is_finished(path: Path) -> bool:
    try:
        return "completed_steps" in json.loads((path / "artifacts" / "summary.json").read_text())
    except (OSError, ValueError):
        return False


def read(path: Path) -> dict[str, Any]:
    """Figures of a finished run from its own record."""
    from pretrain.tracking.metrics_log import effective_records, read_records, series

    records = read_records(path / "metrics.jsonl")
    history = effective_records(records)
    names = [name for r in history if r["event"] == "eval" for name in r["metrics"] if name.endswith("/accuracy")]
    accuracy = {name.split("/")[1]: series(history, "eval", name)[1] for name in dict.fromkeys(names)}
    step_s = [record["metrics"]["step_s"] for record in history if record["event"] == "train"]
    # Every attempt from its first record to its last, also those that were killed. Evaluations afterwards are no part.
    times: dict[int, list[float]] = {}
    for record in records:
        if record["event"] != "harness":
            times.setdefault(record["attempt"], []).append(record["time"])
    wall_s = sum(max(own) - min(own) for own in times.values())
    return {
        "git": _git_of(path),
        "parameters": next(record["parameters"] for record in history if record["event"] == "start"),
        "steps": max(record["step"] for record in history if record["event"] == "train"),
        "eval_steps": series(history, "eval", "validation_accuracy")[0],
        "accuracy": accuracy,
        "validation_loss": series(history, "eval", "validation_loss")[1],
        "attempts": len(times),
        "wall_s": round(wall_s, 1),
        "median_step_s": round(statistics.median(step_s), 4),
    }


def _git_of(path: Path) -> list[dict[str, Any]]:
    """Revision of the code of the first attempt, and of later ones where it was another."""
    files = [path / "git.json", *sorted(path.glob("logs/attempt_*/git.json"))]
    return [_revision(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.is_file()]


def _revision(state: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in ("revision", "dirty")}


def _summary(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Final accuracy by number of pairs: mean, standard deviation over seeds, least and largest."""
    own = [run for run in runs if run["architecture"] == name]
    result = {}
    for part in own[0]["accuracy"]:
        final = [run["accuracy"][part][-1] for run in own]
        spread = statistics.stdev(final) if len(final) > 1 else None
        result[part] = {"mean": statistics.fmean(final), "stdev": spread, "min": min(final), "max": max(final)}
    return result


def _tell(run: dict[str, Any]) -> None:
    final = "  ".join(f"{part} {values[-1]:.3f}" for part, values in run["accuracy"].items())
    print(f"{run['architecture']}, seed {run['seed']}: {final}  ({run['wall_s'] / 60:.1f} minutes)", flush=True)


if __name__ == "__main__":
    main()
