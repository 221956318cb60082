"""Pictures from metrics records. matplotlib is imported inside, with its file-only back end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pretrain.tracking.metrics_log import Record, effective_records, series

_TRAIN, _SMOOTH, _VALIDATION, _RATE = "#9fb8d8", "#1f4e8c", "#d1495b", "#5b8c5a"
_BASELINES = ("#8d6a9f", "#b5838d", "#6c757d", "#bc6c25")


def smooth(values: list[float], half_width: int) -> list[float]:
    """Mean over ``half_width`` neighbours on both sides, fewer near the ends: symmetric, so that nothing lags."""
    smoothed = []
    for index in range(len(values)):
        reach = min(half_width, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def plot_loss_curve(
    records: Iterable[Record],
    path: Path,
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Writes a PNG: training and validation loss (nats per token) over steps, the learning rate below.

    ``baselines`` are bits per byte of other models on the same validation text; they are drawn as lines
    when an evaluation says how this run's loss translates. Raises OSError when ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = effective_records(records)
    figure = Figure(figsize=(8.0, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, losses = series(records, "train", "loss")
    if steps:
        loss_axes.plot(steps, losses, color=_TRAIN, linewidth=0.9, label="training loss")
        # A window of about a twentieth of the run shows the trend at any length.
        loss_axes.plot(steps, smooth(losses, len(losses) // 40), color=_SMOOTH, linewidth=1.8, label="smoothed")
    evaluated, validation = series(records, "eval", "validation_loss")
    if evaluated:
        loss_axes.plot(
            evaluated,
            validation,
            color=_VALIDATION,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label="validation loss",
        )
    ratio = _bits_per_byte_ratio(records)
    if ratio is not None:
        right = loss_axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
        right.set_ylabel("bits per byte (validation text)")
        for color, (name, value) in zip(_BASELINES, (baselines or {}).items(), strict=False):
            loss_axes.axhline(
                value / ratio, color=color, linestyle="--", linewidth=1.2, label=f"{name} ({value:.2f} bits per byte)"
            )
    loss_axes.set_ylabel("loss (nats per token)")
    if title:
        loss_axes.set_title(title, loc="left", fontsize=11)
    if steps or evaluated:
        loss_axes.legend(frameon=False, fontsize=9)
    rate_axes.plot(*series(records, "train", "learning_rate"), color=_RATE, linewidth=1.4)
    rate_axes.set_ylabel("learning rate", fontsize=9)
    rate_axes.set_xlabel("step")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_ylim(bottom=0)
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _bits_per_byte_ratio(records: list[Record]) -> float | None:
    """Bits per byte for one nat per token, which the tokeniser and the validation text fix."""
    for record in reversed(records):
        metrics = record.get("metrics", {})
        if record["event"] == "eval" and metrics.get("validation_loss", 0) > 0:
            if "validation_bits_per_byte" not in metrics:
                return None
            ratio: float = metrics["validation_bits_per_byte"] / metrics["validation_loss"]
            return ratio
    return None
