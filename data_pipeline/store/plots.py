"""The distributions of an inspected dataset as PNG files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_TITLES = {
    "document_lengths": "Document lengths",
    "image_pixels": "Image sizes",
    "widths": "Image widths",
    "heights": "Image heights",
    "sample_bytes": "Sample sizes",
}


def write_plots(tree: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """One PNG for each distribution in ``tree`` (see :func:`data_pipeline.store.inspection.inspect_dataset`).

    Returns their paths. Raises OSError when the folder cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        FigureCanvasAgg(figure)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=100)
        written.append(path)

    for name, title in _TITLES.items():
        found = tree.get(name)
        if not found or not found["counts"]:
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        labels = [f"{low:,}" for low in found["edges"][:-1]]
        axes.bar(range(len(labels)), found["counts"], width=0.9)
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set(title=f"{title} ({found['number']:,})", xlabel=f"{found['unit']} (from)", ylabel="count")
        save(figure, name)
    if tree.get("token_counts"):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.loglog(range(1, len(tree["token_counts"]) + 1), tree["token_counts"])
        axes.set(title="Token frequency", xlabel="rank", ylabel="count")
        axes.grid(visible=True, which="both", alpha=0.3)
        save(figure, "token_frequency")
    return written
