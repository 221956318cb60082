"""Wall time of the demo after installation, by part, and what it reached.

    python benchmarks/demo.py

Runs the two commands of ``make demo`` in a fresh temporary folder, so nothing is reused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import write_result

from pretrain.tracking.metrics_log import read_records

COMMANDS = {
    "prepare": ["data", "prepare", "stdlib", "data/stdlib"],
    "run": ["run", "experiment=demo", "--run-dir", "runs/demo"],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seconds = {}
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "pretrain.cli", *arguments], cwd=folder, check=True)
            seconds[name] = time.perf_counter() - started
        run = Path(folder) / "runs/demo"
        records = read_records(run / "metrics.jsonl")
        times = [record["time"] for record in records if record["event"] == "train"]
        seconds["of that: first to last step"] = times[-1] - times[0]
        seconds["total"] = seconds["prepare"] + seconds["run"]
        summary = json.loads((run / "artifacts/summary.json").read_text())
    summary.pop("samples")
    for name, value in seconds.items():
        print(f"{name:<28} {value:8.1f} s")
    write_result("demo", {"seconds": seconds, "summary": summary})


if __name__ == "__main__":
    main()
