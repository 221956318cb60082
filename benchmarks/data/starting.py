"""Sub-benchmarks ``starting`` (time to first batch, also far into the run; resuming) and ``memory``."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import registry
from contender_process import ContenderProcess
from results_file import quartiles
from setting import Setting
from turns import convert_all

_PROBE = Path(__file__).with_name("probe_positions.py")
_POSITIONS = (0, 10**4, 10**6, 10**8, 10**10)
_RESUMES = 20
_RESUME_GOAL = 0.5


def run_starting(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """Seconds from opening to the first batch, in fresh processes; imports apart."""
    # One variant of each module: they start alike.
    variants = {contender.module: contender for contender in reversed(registry.TEXT)}
    chosen = [variants[module] for module in reversed(variants) if not only or module in only]
    failures: dict[str, str] = {}
    convert_all(setting, chosen, failures, setting.dataset())
    first: dict[str, list[dict[str, Any]]] = {}
    for _ in range(2 if setting.quick else 3):
        for contender in chosen:
            if contender.name in failures:
                continue
            try:
                with setting.open(contender, "serve") as process:
                    first.setdefault(contender.name, []).append(process.opened)
            except Exception as error:
                failures[contender.name] = str(error)
                print(f"  {contender.name} FAILED: {error}", file=sys.stderr)
    table = {
        name: {key: statistics.median(answer[key] for answer in answers) for key in ("first_batch_s", "import_s")}
        for name, answers in first.items()
    }
    positions, resumes = _positions(setting)
    print(f"\n{'starting':<48}{'first batch s':>14}{'imports s':>11}")
    for name, entry in table.items():
        print(f"{name:<48}{entry['first_batch_s']:>14.3f}{entry['import_s']:>11.2f}")
    print(f"{'ours, first batch at sample':<48}" + " ".join(f"{int(p):.0e}: {s:.3f} s" for p, s in positions.items()))
    worst = max(resumes)
    print(
        f"{'ours, resume at random samples':<48}median {statistics.median(resumes):.3f} s, largest {worst:.3f} s; "
        f"goal below {_RESUME_GOAL} s: {'reached' if worst < _RESUME_GOAL else 'NOT reached'}"
    )
    return {
        "unit": "seconds from opening to the first batch; medians over fresh processes",
        "contenders": table,
        "ours_at_sample": positions,
        "ours_resume": quartiles(resumes) | {"largest": worst, "goal": _RESUME_GOAL},
        "failures": failures,
    }


def _positions(setting: Setting) -> tuple[dict[str, float], list[float]]:
    """Median time at each fixed sample, and the times at random ones; one process, after one throw-away start."""
    generator = random.Random(0)
    fixed = [position for position in _POSITIONS for _ in range(5)]
    generator.shuffle(fixed)
    wanted = fixed + [generator.randrange(10**9) for _ in range(_RESUMES)]
    answer = subprocess.run(
        [sys.executable, str(_PROBE), str(setting.dataset()), *map(str, wanted)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds = json.loads(answer.stdout.strip().splitlines()[-1])
    times: dict[str, list[float]] = {}
    for position, value in zip(fixed, seconds, strict=False):
        times.setdefault(str(position), []).append(value)
    return {str(p): statistics.median(times[str(p)]) for p in _POSITIONS}, seconds[len(fixed) :]


def run_memory(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """Loader memory of ours for a quarter, half and all of the corpus with the same lanes, and twice the lanes."""
    whole = setting.dataset()
    blocks = json.loads((whole / "manifest.json").read_text())["content"]["splits"]["train"]["blocks"]
    lanes = max(1, blocks // 4 // 4)  # so that a quarter has four blocks for each
    table = {}
    for name, share, count in (
        ("1/4", 0.25, lanes),
        ("1/2", 0.5, lanes),
        ("1", 1.0, lanes),
        ("1, lanes doubled", 1.0, 2 * lanes),
    ):
        dataset = whole if share == 1.0 else _part(whole, share)
        contender = registry.Contender("ours", "ours", f"lean:lanes={count}", "")
        arguments = ["serve", contender.module, contender.variant, str(dataset), "-", "0"]
        with ContenderProcess(Path(sys.executable), arguments, setting.log("memory"), 120.0) as process:
            answer = process.turn(3 * setting.seconds)
            table[name] = {
                "loader_mb": answer["resident_mb"] - process.opened["baseline_mb"],
                "shards_mb": sum(path.stat().st_size for path in dataset.glob("*.tar")) / 1e6,
                "lanes": count,
                "epochs": answer["positions"] / (sum(p.stat().st_size for p in dataset.glob("*.tar")) / 2),
            }
    print(f"\n{'memory of our loader, share of corpus':<40}{'shards MB':>10}{'lanes':>7}{'loader MB':>11}{'epochs':>8}")
    for name, entry in table.items():
        row = f"{entry['shards_mb']:>10.0f}{entry['lanes']:>7}{entry['loader_mb']:>11.1f}{entry['epochs']:>8.1f}"
        print(f"{name:<40}{row}")
    return {"unit": "MB resident above the process before opening", "table": table}


def _part(dataset: Path, share: float) -> Path:
    """A data set of the first shards of ``dataset``, linked, with a manifest of its own."""
    import shutil

    from data_pipeline.store.manifest import digest_of

    tree = json.loads((dataset / "manifest.json").read_text())
    train = tree["content"]["splits"]["train"]
    shards = train["shards"][: max(1, round(share * len(train["shards"])))]
    train["shards"] = shards
    for key in ("documents", "tokens", "blocks", "bytes"):
        if all(key in shard for shard in shards):
            train[key] = sum(shard[key] for shard in shards)
    tree["fingerprint"] = digest_of(tree["content"])
    out = dataset.with_name(f"{dataset.name}-part-{share}")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    stems = [Path(shard["name"]).stem for shard in shards]
    for name in ["tokenizer.json", *(stem + end for stem in stems for end in (".tar", ".json"))]:
        (out / name).hardlink_to(dataset / name)
    (out / "manifest.json").write_text(json.dumps(tree))
    return out
