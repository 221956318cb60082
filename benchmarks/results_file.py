"""Records of benchmarks: figures with date, hardware, versions and command, one JSON file each."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "mlflow", "numpy")


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def hardware() -> dict[str, Any]:
    """Processor, usable cores and operating system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"processor": model, "usable_cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` and print its path; the newest run replaces an older one."""
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "command": shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{path.name}")
    return path
