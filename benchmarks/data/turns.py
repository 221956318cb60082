"""Contenders taking turns, and what a failure of one of them means: it is told, the others go on."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from contender_process import ContenderProcess
from registry import Contender
from results_file import quartiles
from setting import Setting


def convert_all(setting: Setting, chosen: list[Contender], failures: dict[str, str], dataset: Path) -> dict[str, float]:
    """Bring the data set into every contender's form; seconds each took, remembered with the result."""
    seconds = {}
    for contender in chosen:
        done = setting.converted(contender).with_suffix(".json")
        try:
            if not done.exists():
                with setting.open(contender, "convert", dataset=dataset) as process:
                    done.parent.mkdir(parents=True, exist_ok=True)
                    done.write_text(json.dumps(process.opened))
            seconds[contender.name] = json.loads(done.read_text())["seconds"]
        except Exception as error:
            _failed(failures, contender.name, f"while converting: {error}")
    return seconds


def take_turns(
    setting: Setting,
    entries: list[Contender],
    workers: int,
    failures: dict[str, str],
    dataset: Path,
    rate: Callable[[dict[str, Any]], float],
    baselines: dict[str, Callable[[Path, float], float]],
) -> dict[str, dict[str, Any]]:
    """Quartiles of each contender's ``rate`` (also per second of processor time, which other load disturbs less), dtype
    and memory; ``baselines`` are measured in this process."""
    rates: dict[str, list[float]] = {}
    frugal: dict[str, list[float]] = {}
    opened: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        processes: list[tuple[str, ContenderProcess]] = []
        for contender in entries:
            try:
                process = stack.enter_context(setting.open(contender, "serve", workers, dataset))
                process.turn(setting.seconds / 2)  # warm-up
            except Exception as error:
                _failed(failures, f"{contender.name}, {workers} workers", str(error))
                continue
            opened[contender.name] = process.opened
            processes.append((contender.name, process))
        for _ in range(setting.rounds):
            for name, measure in baselines.items():
                rates.setdefault(name, []).append(measure(dataset, setting.seconds))
            for name, process in list(processes):
                try:
                    answer = process.turn(setting.seconds)
                except Exception as error:
                    _failed(failures, f"{name}, {workers} workers", str(error))
                    processes.remove((name, process))
                    continue
                rates.setdefault(name, []).append(rate(answer))
                frugal.setdefault(name, []).append(rate(answer) * answer["seconds"] / max(answer["cpu_s"], 1e-3))
                opened[name]["resident_mb"] = answer["resident_mb"]
    return {
        name: quartiles(values)
        | {key: opened[name][key] for key in ("dtype", "resident_mb") if name in opened}
        | ({"median_per_cpu_s": statistics.median(frugal[name])} if name in frugal else {})
        for name, values in rates.items()
        if len(values) > 1
    }


def by_name(groups: dict[int, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """``{workers: {name: figures}}`` as ``{name: {"workers_N": figures}}``."""
    names = dict.fromkeys(name for group in groups.values() for name in group)
    return {
        name: {f"workers_{workers}": group[name] for workers, group in groups.items() if name in group}
        for name in names
    }


def best(entry: dict[str, Any] | None) -> float | None:
    """The highest median over the numbers of workers."""
    return max(group["median"] for group in entry.values()) if entry else None


def print_failures(failures: dict[str, str]) -> None:
    """One line each."""
    for name, why in failures.items():
        print(f"  FAILED {name}: {why}")


def _failed(failures: dict[str, str], name: str, why: str) -> None:
    failures[name] = why
    print(f"  {name} FAILED {why}", file=sys.stderr)
