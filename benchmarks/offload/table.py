"""Results as Markdown: a table for each size and number of tokens, the ablation, and the goals. What was not measured
says so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from offload.arms import ABLATION_ROWS, ARMS, NO_OFFLOAD, STOCK, Arm
from offload.record import FAILED, FUNCTION_CHECK, MEASURED, loss_difference, repeats, summary
from offload.sizes import SIZES, TINY

UPDATE_GOAL, ITERATION_GOAL, NEAR_GOAL = 3.0, 1.3, 1.10
FEW_TOKENS, MANY_TOKENS = 4096, 32768
OURS = ("engine_overlap", "torch_overlap")
"""The arm that goals are judged by; the second where the first was not measured."""

HEADER = (
    "arm",
    "exposed update ms",
    "iteration ms",
    "tokens/s",
    "forward ms",
    "backward ms",
    "up GB/s (B/param)",
    "down GB/s (B/param)",
    "device GiB",
    "host GiB",
    "update predicted / actual ms",
    "loss difference",
)

Cells = Mapping[str, Mapping[str, Any]]


def report(data: Mapping[str, Any]) -> str:
    """The whole of ``offload.md``."""
    cells: Cells = data["cells"]
    machine = data["machine"]
    lines = [
        "# Optimizer-state offloading: measured",
        "",
        f"{data['date']}; {machine['gpu'] or 'no GPU'}; {machine['processor']}, {machine['usable_cores']} cores, "
        f"{machine['host_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
        "",
        *(f"    {command}" for command in data["commands"]),
        "",
        "Medians over all steps and rounds, quartiles in brackets. Exposed update: from the end of the backward pass "
        "to the moment at which the next forward pass may start, with norm and clipping. GB/s while copies run. "
        "Predicted and actual updates are those of the online model, without the norm. Loss "
        "difference: the most in a step, nats, against the arm without offload that computes the same. What was not "
        "measured says so.",
        "",
    ]
    for size, tokens in places(cells):
        own = [c for c in cells.values() if (c["size"], c["tokens"]) == (size, tokens)]
        is_check = any(cell["status"] == FUNCTION_CHECK for cell in own)
        title = f"## {size}, {tokens:,} tokens a step"
        lines += [
            title + (": a function check on the CPU, no claim of speed; subgroups are small" if is_check else ""),
            "",
        ]
        main = [arm.name for arm in ARMS.values() if not arm.ablation]
        lines += [*table(cells, size, tokens, main), ""]
        if any(ARMS[cell["arm"]].ablation for cell in own):
            lines += ["Ablation, in plain torch:", "", *table(cells, size, tokens, ABLATION_ROWS), ""]
    lines += ["## Goals", "", *(f"- {line}" for line in goals(cells))]
    return "\n".join(lines) + "\n"


def places(cells: Cells) -> list[tuple[str, int]]:
    """Sizes and tokens of the tables, in the order of the cells."""
    return list(dict.fromkeys((cell["size"], cell["tokens"]) for cell in cells.values()))


def table(cells: Cells, size: str, tokens: int, arms: Sequence[str]) -> list[str]:
    """Rows of those ``arms`` that have a cell."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for name in arms:
        cell = cells.get(f"{size}/{tokens}/{name}")
        if cell is not None:
            rows.append(_row(ARMS[name], cell, cells.get(f"{size}/{tokens}/{ARMS[name].reference}")))
    return [f"| {' | '.join(row)} |" for row in rows]


def _row(arm: Arm, cell: Mapping[str, Any], reference: Mapping[str, Any] | None) -> tuple[str, ...]:
    label = f"{arm.label} ({arm.note})" if arm.note else arm.label
    if cell["status"] not in (MEASURED, FUNCTION_CHECK):
        shown = cell["reason"] if cell["status"] == FAILED else f"{cell['status']}: {cell['reason']}"
        return (label, shown.replace("|", "/"), *("–",) * (len(HEADER) - 2))
    rounds = cell["rounds"]
    if rounds[0].get("ratio") is not None:
        label += f" {rounds[0]['ratio']:g}"
    if cell["reason"]:
        label += f" ({cell['reason']})"
    found = summary(cell)
    iteration = found["iteration"]["median"]
    copies = rounds[-1].get("copies") or {}
    difference = loss_difference(cell, reference)
    shown_difference = "not measured" if difference is None else "0" if difference == 0 else f"{difference:.1e}"
    if arm.name == arm.reference:
        shown_difference = "reference"
    if not repeats(rounds):
        shown_difference += ", rounds differ"
    host = _gib(max(one["peak_host_bytes"] for one in rounds))
    if cell["status"] == FUNCTION_CHECK:
        # Times of a small model on a CPU, perhaps a busy one, are in the record and would only mislead here.
        if arm.kind == "deepspeed":
            label += " (torch's AdamW in place of its own)"
        return (label, FUNCTION_CHECK, *("–",) * 7, host, "–", shown_difference)
    predicted = [pair for one in rounds for pair in one.get("predicted_and_actual_ms", ())]
    return (
        label.replace("|", "/"),
        _spread(found["update"]),
        _spread(found["iteration"]),
        f"{cell['tokens'] / iteration * 1e3:,.0f}",
        f"{found['forward']['median']:.1f}",
        f"{found['backward']['median']:.1f}",
        *(_copies(copies.get(side), cell) for side in ("up", "down")),
        _gib(max((one.get("peak_device_bytes") or 0 for one in rounds), default=0)),
        host,
        " / ".join(f"{median(side):.1f}" for side in zip(*predicted, strict=True)) if predicted else "–",
        shown_difference,
    )


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.1f} [{values['low']:.1f}, {values['high']:.1f}]"


def _copies(side: Mapping[str, float] | None, cell: Mapping[str, Any]) -> str:
    if side is None:
        return "not measured"
    return f"{side['gb_per_s']:.1f} ({side['bytes'] / SIZES[cell['size']].parameters:.1f})"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}" if num_bytes else "–"


def goals(cells: Cells) -> Iterator[str]:
    """Each goal at each size where it is asked, reached or not; "not measured" where a row of it is missing."""
    sizes = dict.fromkeys(size for size, _ in places(cells) if size != TINY)
    if not sizes:
        yield "not measured: goals are asked of the sizes from 1b on, on a GPU"
    for size in sizes:
        few = [t for s, t in places(cells) if s == size and t <= FEW_TOKENS]
        many = [t for s, t in places(cells) if s == size and t >= MANY_TOKENS]
        for tokens in few:
            yield from _against_stock(cells, size, tokens)
        for tokens in many:
            yield _against_none(cells, size, tokens)


def _against_stock(cells: Cells, size: str, tokens: int) -> Iterator[str]:
    stock = _medians(cells, size, tokens, STOCK)
    name, ours = _best(cells, size, tokens, OURS)
    for phase, goal, what in (("update", UPDATE_GOAL, "exposed update"), ("iteration", ITERATION_GOAL, "iteration")):
        asked = f"{size}, {tokens:,} tokens: {what} at least {goal:g}x shorter than DeepSpeed ZeRO-3 offload's"
        if stock is None or ours is None:
            yield f"{asked}: not measured"
            continue
        if differs := _other_losses(cells, size, tokens, name):
            yield f"{asked}: not judged, {differs}"
            continue
        ratio = stock[phase] / ours[phase] if ours[phase] else math.inf
        bound = "" if stock["update"] > stock["iteration"] / 2 else "; its update is less than half of its iteration"
        yield f"{asked}: {'reached' if ratio >= goal else 'NOT reached'}, {ratio:.2f}x ({ARMS[name].label}{bound})"


def _against_none(cells: Cells, size: str, tokens: int) -> str:
    name, ours = _best(cells, size, tokens, OURS)
    found = [(_medians(cells, size, tokens, other), other) for other in NO_OFFLOAD]
    known = [(medians["iteration"], other) for medians, other in found if medians is not None]
    asked = f"{size}, {tokens:,} tokens: iteration at most {NEAR_GOAL:g}x that of the fastest arm without offload"
    if not known or ours is None:
        return f"{asked}: not measured"
    if differs := _other_losses(cells, size, tokens, name):
        return f"{asked}: not judged, {differs}"
    fastest, other = min(known)
    ratio = ours["iteration"] / fastest
    verdict = "reached" if ratio <= NEAR_GOAL else "NOT reached"
    return f"{asked}: {verdict}, {ratio:.2f}x ({ARMS[name].label}, against {ARMS[other].label})"


def _other_losses(cells: Cells, size: str, tokens: int, arm: str) -> str:
    """Why the arm's times say nothing: its losses are not those of its reference; empty if they are."""
    cell = cells[f"{size}/{tokens}/{arm}"]
    reference = ARMS[arm].reference
    difference = loss_difference(cell, cells.get(f"{size}/{tokens}/{reference}"))
    if difference is None:
        return f"losses were not compared: {ARMS[reference].label} was not measured"
    # A difference that is no number is no equality either.
    if difference != 0:
        return f"losses differ from those of {ARMS[reference].label} by {difference:.1e}"
    return "" if repeats(cell["rounds"]) else "losses differ between rounds"


def _best(cells: Cells, size: str, tokens: int, names: Sequence[str]) -> tuple[str, dict[str, float] | None]:
    """The first of ``names`` that was measured."""
    for name in names:
        medians = _medians(cells, size, tokens, name)
        if medians is not None:
            return name, medians
    return names[0], None


def _medians(cells: Cells, size: str, tokens: int, arm: str) -> dict[str, float] | None:
    """Of a cell that was measured on a GPU."""
    cell = cells.get(f"{size}/{tokens}/{arm}")
    if cell is None or cell["status"] != MEASURED:
        return None
    return {name: values["median"] for name, values in summary(cell).items()}
