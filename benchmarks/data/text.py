"""Sub-benchmark ``text``: Mtokens/s to batches in the training process, all contenders taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from registry import TEXT
from setting import Setting
from turns import best, by_name, convert_all, print_failures, take_turns

_BUFFER = 16 << 20
# Ours against ... : at least (least) or at most (most) so many times.
_GOALS = (
    ("webdataset, document members", 10.0),
    ("litdata", 1.0),
    ("Megatron-Core GPTDataset", 1.0),
    ("Megatron-Core GPTDataset, tokens only", 1.0),
    ("Energon, block members", 1.0),
    ("Energon, document members", 1.0),
    ("mosaicml-streaming", 1.0),
    ("webdataset, block members", 1 / 1.3),
    ("webdataset, block members, documents shuffled", 1 / 1.3),
)


def run(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """Figures of all contenders (``only``: modules to take) for 0 and 2 worker processes."""
    chosen = [contender for contender in TEXT if not only or contender.module in only]
    failures: dict[str, str] = {}
    dataset = setting.dataset()
    converted = convert_all(setting, chosen, failures, dataset)
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for workers in (0, 2):
        entries = [c for c in chosen if workers in c.workers and c.name not in failures]
        with_raw: dict[str, Callable[[Path, float], float]] = {"raw sequential read": raw_read} if workers == 0 else {}
        groups[workers] = take_turns(setting, entries, workers, failures, dataset, _rate, with_raw)
    table = by_name(groups)
    _print(table, groups[0].get("raw sequential read"), failures)
    return {
        "unit": "Mtokens/s; quartiles over the rounds",
        "work": f"{common.BATCH_ROWS} rows of {common.ROW} tokens, shuffled, int32 or int64 tensors",
        "settings": {contender.name: contender.settings for contender in chosen},
        "convert_seconds": converted,
        "contenders": table,
        "goals": goals(table),
        "failures": failures,
    }


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["positions"] / answer["seconds"] / 1e6)


def raw_read(dataset: Path, seconds: float) -> float:
    """Mtokens/s of reading the shards from start to end, over and over, into one buffer (2 bytes a token)."""
    buffer = memoryview(bytearray(_BUFFER))
    total = 0
    started = time.perf_counter()
    while True:
        for shard in common.shards(dataset):
            with open(shard, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total += count
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return total / 2 / elapsed / 1e6


def goals(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ours against each rival at its best number of workers: the ratio, what it should be, whether it is."""
    ours = best(table.get("ours"))
    verdicts = {}
    for name, wanted in _GOALS:
        theirs = best(table.get(name))
        if ours and theirs:
            ratio = ours / theirs
            verdicts[name] = {"ratio": ratio, "goal": wanted, "reached": ratio >= wanted}
    return verdicts


def _print(table: dict[str, dict[str, Any]], raw: dict[str, Any] | None, failures: dict[str, str]) -> None:
    print(
        f"\n{'text, Mtokens/s':<48}{'1 process':>12}{'quartiles':>18}{'of raw read':>13}{'per CPU s':>11}"
        f"{'2 workers':>11}{'ours/theirs':>13}"
    )
    ours = best(table.get("ours"))
    for name, entry in sorted(table.items(), key=lambda item: -(best(item[1]) or 0)):
        alone, pair = entry.get("workers_0"), entry.get("workers_2")
        cells = [f"{name:<48}"]
        cells.append(f"{alone['median']:>12.1f}{alone['low']:>9.1f}{alone['high']:>9.1f}" if alone else " " * 30)
        share = alone["median"] / raw["median"] if alone and raw else None
        cells.append(f"{share:>12.2%} " if share else " " * 13)
        frugal = alone.get("median_per_cpu_s") if alone else None
        cells.append(f"{frugal:>11.1f}" if frugal else " " * 11)
        cells.append(f"{pair['median']:>11.1f}" if pair else " " * 11)
        theirs = best(entry)
        cells.append(f"{ours / theirs:>13.2f}" if ours and theirs else "")
        print("".join(cells))
    for name, verdict in goals(table).items():
        word = "reached" if verdict["reached"] else "NOT reached"
        print(f"  goal: ours / {name} at least {verdict['goal']:.2f}: {verdict['ratio']:.2f}, {word}")
    print_failures(failures)
