"""Picture of a step's timeline: measured above predicted. Torch-free; matplotlib is imported inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.optim.offload.schedule import Kind, Queue
from pretrain.optim.offload.timeline import BACKWARD, FORWARD, MODEL, UPDATE, Side

_COLORS = {
    Kind.PREFETCH: "#1f4e8c",
    Kind.FLUSH: "#6fa3d8",
    Kind.DEVICE_UPDATE: "#5b8c5a",
    Kind.CPU_UPDATE: "#bc6c25",
    Kind.GRADIENT_DOWN: "#8d6a9f",
    Kind.WEIGHT_DOWN: "#b5838d",
    Kind.WEIGHT_UP: "#c9a227",
}
_NAMES = {
    Kind.PREFETCH: "state to the device",
    Kind.FLUSH: "state back",
    Kind.DEVICE_UPDATE: "update on the device",
    Kind.CPU_UPDATE: "update on the CPU",
    Kind.GRADIENT_DOWN: "gradient to the host",
    Kind.WEIGHT_DOWN: "weight to the host",
    Kind.WEIGHT_UP: "weight to the device",
}
_PHASES = {FORWARD: "#dfe5ec", BACKWARD: "#c3ccd6", UPDATE: "#f2c6c2"}
_PHASE_NAMES = {FORWARD: "forward", BACKWARD: "last backward", UPDATE: "waits for the update"}
_QUEUES = (
    Queue.STATE_UP,
    Queue.WEIGHT_UP,
    Queue.DEVICE,
    Queue.CPU,
    Queue.GRADIENT_DOWN,
    Queue.STATE_DOWN,
)
_THINNEST = 0.5  # points, of an operation that is shorter than a pixel
_STALL, _HATCH = "#e0a3a8", "////"
_INCHES_PER_ROW = 0.34
_NARROWEST_LABEL = 0.022  # of the width, so that a number of two digits fits
# Of the width, about 6 pixels: white edges would cover what is shorter.
_NARROWEST_EDGE = 0.006


def plot_timeline(path: Path, sides: Sequence[Side], *, title: str) -> None:
    """Writes a PNG with one panel for each of ``sides`` on one axis of time, in which 0 is the beginning of the update.

    Raises:
        OSError: ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    used = {timed.operation.queue for side in sides for timed in side.operations}
    rows = [MODEL, *(queue.value for queue in _QUEUES if queue in used)]
    height = len(sides) * (len(rows) * _INCHES_PER_ROW + 0.45) + 1.5
    figure = Figure(figsize=(11.0, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sides), 1, sharex=True, squeeze=False)[:, 0]
    start, end = min(side.start for side in sides), max(side.end for side in sides)
    scale, unit = (1.0, "s") if end - start >= 2 else (1e3, "ms") if end - start >= 2e-3 else (1e6, "µs")
    for axes, side in zip(panels, sides, strict=True):
        _draw(axes, side, rows, scale, (end - start) * scale)
        axes.set_title(
            f"{side.name}: update {side.update_s * scale:.4g} {unit}, exposed {side.exposed_s * scale:.4g} {unit}",
            loc="left",
            fontsize=10,
        )
    margin = 0.01 * (end - start)
    panels[-1].set_xlim((start - margin) * scale, (end + margin) * scale)
    panels[-1].set_xlabel(f"{unit} from the beginning of the update (the gradient norm is known)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    kinds = {timed.operation.kind for side in sides for timed in side.operations}
    patches = [Patch(color=_COLORS[kind], label=_NAMES[kind]) for kind in Kind if kind in kinds]
    patches.append(Patch(facecolor="none", edgecolor=_STALL, hatch=_HATCH, label="stall", linewidth=0))
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axes: Any, side: Side, rows: Sequence[str], scale: float, width: float) -> None:
    line = {name: number for number, name in enumerate(rows)}
    for phase in side.phases:
        begin, length = phase.start * scale, (phase.end - phase.start) * scale
        axes.barh(line[MODEL], length, 0.8, left=begin, color=_PHASES[phase.name], edgecolor="white", linewidth=0.6)
        if phase.name == UPDATE:
            _hatch(axes, line[MODEL], begin, length)
        name = _PHASE_NAMES[phase.name]
        if length > width * 0.011 * len(name):
            box = {"facecolor": _PHASES[phase.name], "edgecolor": "none", "pad": 1.5}
            middle = begin + length / 2
            axes.text(middle, line[MODEL], name, ha="center", va="center", fontsize=8, color="#333333", bbox=box)
    for queue, begin, stop in side.stalls():
        _hatch(axes, line[queue.value], begin * scale, (stop - begin) * scale)
    for timed in side.operations:
        begin, length = timed.start * scale, (timed.end - timed.start) * scale
        row = line[timed.operation.queue.value]
        color = _COLORS[timed.operation.kind]
        if length > width * _NARROWEST_EDGE:
            axes.barh(row, length, 0.8, left=begin, color=color, edgecolor="white", linewidth=0.5)
        else:
            axes.barh(row, length, 0.8, left=begin, color=color, edgecolor=color, linewidth=_THINNEST)
        if length > width * _NARROWEST_LABEL:
            number = str(timed.operation.subgroup)
            axes.text(begin + length / 2, row, number, ha="center", va="center", fontsize=7, color="white")
    for at in (0.0, side.update_s):
        axes.axvline(at * scale, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _hatch(axes: Any, row: int, begin: float, length: float) -> None:
    axes.barh(row, length, 0.8, left=begin, facecolor="none", edgecolor=_STALL, hatch=_HATCH, linewidth=0)
