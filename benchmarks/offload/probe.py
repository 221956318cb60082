"""The five-minute probe of a machine before the benchmark: memory, CPU updates, link, sizes of subgroups.

    python benchmarks/offload/probe.py [--threads 1 4 8 16] [--smoke]

Memory and the CPU's AdamW are those of ``benchmarks/cpu_adamw.py`` with fewer rounds: what the traffic of an update
alone takes (``traffic``), ours, DeepSpeedCPUAdam and torch's fused one. The link is measured as the planner
measures it: each way alone, both at once, and beside CPU updates. The sweep updates ``--parameters`` BF16 weights
without a model, streaming and hybrid, by the size of a subgroup. Without a GPU link and sweep are not measured. Results
go to ``benchmarks/results/offload_probe.json`` (with ``--smoke`` below ``build/``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

import cpu_adamw  # noqa: E402

from offload.cell import reason_of  # noqa: E402
from offload.record import machine, versions  # noqa: E402

SUBGROUPS_M = (10, 30, 100, 300, 1000)
RATES = ("h2d", "d2h", "h2d_duplex", "d2h_duplex")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--parameters", type=int, default=3_000_000_000, help="of the sweep: 14 bytes each on the host")
    parser.add_argument("--smoke", action="store_true", help="small and short")
    arguments = parser.parse_args()
    facts = machine()
    cores = facts["usable_cores"]
    threads = sorted({min(count, cores) for count in arguments.threads})
    cpu_parameters, rounds = (1 << 22, 2) if arguments.smoke else (64 << 20, 7)
    data: dict[str, Any] = {
        "benchmark": "offload_probe",
        "machine": facts,
        "versions": versions(),
        "command": shlex.join(["python", "benchmarks/offload/probe.py", *sys.argv[1:]]),
    }
    data["cpu"] = {str(count): _apart(_cpu, count, cpu_parameters, rounds) for count in threads}
    for count, found in data["cpu"].items():
        print(_cpu_line(count, found), flush=True)
    for name, work in (("link", _link), ("sweep", _sweep)):
        data[name] = "not measured: no GPU" if facts["gpu"] is None else _apart(work, arguments.parameters)
        print(f"{name}: {json.dumps(data[name])}", flush=True)
    folder = _HERE.parents[1] / "build" if arguments.smoke else _HERE.parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / "offload_probe.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {path}")


def _apart(work: Callable[..., Any], *given: Any) -> Any:
    """What ``work`` finds in a process of its own, or why it found nothing."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    if work is _cpu:
        os.environ["OMP_NUM_THREADS"] = str(given[0])  # read by every OpenMP runtime of the process about to start
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    process = context.Process(target=_answer, args=(work, given, results))
    process.start()
    process.join()
    return results.get() if process.exitcode == 0 else f"failed: the process ended with {process.exitcode}"


def _answer(work: Callable[..., Any], given: tuple[Any, ...], results: Any) -> None:
    try:
        results.put(work(*given))
    except Exception as error:
        results.put(reason_of(error))


def _cpu(threads: int, parameters: int, rounds: int) -> dict[str, Any]:
    """Gparam/s and GB/s by task and contender; ``level``: of our kernel."""
    kept = _Kept()
    cpu_adamw._measure(threads, parameters, rounds, kept)
    level, seconds = kept.value
    return {**cpu_adamw._figures(seconds, parameters), "level": level}


class _Kept:
    """In place of a queue to another process."""

    def put(self, value: Any) -> None:
        self.value = value


def _cpu_line(threads: str, found: Any) -> str:
    if isinstance(found, str):
        return f"{threads} threads: {found}"
    memory = found["traffic"]["bound"]["gb_per_s"]
    rates = ", ".join(
        f"{name} {row['gparam_per_s']['median']:.2f}" for name, row in found["bf16"].items() if "gparam_per_s" in row
    )
    return f"{threads} threads: memory {memory:.1f} GB/s; update with clip and BF16 weights, Gparam/s: {rates}"


def _link(_: int) -> dict[str, float]:
    """The planner's constants: bytes/s and elements/s."""
    import torch

    from pretrain.optim.offload.probe import probe

    return dataclasses.asdict(probe(torch.device("cuda", 0), seconds=20.0))


def _sweep(parameters: int) -> dict[str, dict[str, Any]]:
    """By way and size of a subgroup the milliseconds of an update, the median of five, or why there are none."""
    found: dict[str, dict[str, Any]] = {}
    for way, fraction in (("streaming", 1.0), ("hybrid", "auto")):
        found[way] = {}
        for millions in SUBGROUPS_M:
            try:
                found[way][f"{millions}m"] = _update_ms(parameters, millions * 1_000_000, fraction)
            except Exception as error:
                found[way][f"{millions}m"] = reason_of(error)
    return found


def _update_ms(parameters: int, subgroup: int, fraction: Any) -> float:
    import torch

    from pretrain.config.schema import OffloadConfig
    from pretrain.optim.offload.states import GroupSettings, OffloadedStates

    weights = torch.zeros(parameters, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    gradient = torch.empty_like(weights).normal_(0, 1e-3)
    config = OffloadConfig(enabled=True, fraction=fraction, subgroup_size=subgroup, overlap=False)
    states = OffloadedStates([weights], [0], config, gradient_dtype=torch.bfloat16)
    settings = [GroupSettings(1e-6, (0.9, 0.95), 1e-8, 0.1)]
    times = []
    for step in range(1, 8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        states.update([gradient], settings, step)
        states.synchronize()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return median(times[2:])


if __name__ == "__main__":
    main()
