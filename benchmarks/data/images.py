"""Sub-benchmark ``images``: images with captions per second, from JPEG in shards to uint8 [32, 256, 256, 3] and caption
ids in the training process."""

from __future__ import annotations

import json
from typing import Any

from registry import IMAGES
from setting import Setting
from turns import best, by_name, convert_all, print_failures, take_turns


def run(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """Figures for decoding in the training process (0) and in two threads (ours) or processes (the others)."""
    dataset = setting.pictures()
    train = json.loads((dataset / "manifest.json").read_text())["content"]["splits"]["train"]
    chosen = [contender for contender in IMAGES if not only or contender.module in only]
    failures: dict[str, str] = {}
    convert_all(setting, chosen, failures, dataset)
    groups = {}
    for workers in (0, 2):
        entries = [contender for contender in chosen if contender.name not in failures]
        groups[workers] = take_turns(setting, entries, workers, failures, dataset, _rate, {})
    table = by_name(groups)
    rivals = {name: best(entry) or 0.0 for name, entry in table.items() if name != "ours"}
    ours = best(table.get("ours"))
    goal = None
    print(f"\n{'images/s':<36}{'0 workers':>11}{'quartiles':>18}{'2 workers':>11}{'quartiles':>18}{'ours/theirs':>13}")
    for name, entry in sorted(table.items(), key=lambda item: -(best(item[1]) or 0)):
        cells = [f"{name:<36}"]
        for key in ("workers_0", "workers_2"):
            group = entry.get(key)
            cells.append(f"{group['median']:>11.0f}{group['low']:>9.0f}{group['high']:>9.0f}" if group else " " * 29)
        theirs = best(entry)
        cells.append(f"{ours / theirs:>13.2f}" if ours and theirs else "")
        print("".join(cells))
    if ours and rivals:
        fastest = max(rivals, key=lambda name: rivals[name])
        goal = {"fastest_other": fastest, "ratio": ours / rivals[fastest], "reached": ours >= rivals[fastest]}
        word = "reached" if goal["reached"] else "NOT reached"
        print(f"  goal: not slower than the fastest other ({fastest}): {goal['ratio']:.2f}, {word}")
    print_failures(failures)
    return {
        "unit": "images with captions per second; quartiles over the rounds",
        "pictures": {"count": train["samples"], "bytes": train["bytes"]},
        "settings": {contender.name: contender.settings for contender in chosen},
        "contenders": table,
        "goal": goal,
        "failures": failures,
    }


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["rows"] / answer["seconds"])
