"""Seconds until our loader's first batch at each of the given samples, in one process. Started by ``starting.py``.

python probe_positions.py DATASET SAMPLE ...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE / "contenders")]

import common  # noqa: E402
import ours  # noqa: E402


def main() -> None:
    dataset = Path(sys.argv[1])
    next(ours.open_loader(dataset, 0))  # writes the plan and imports the rest
    seconds = []
    for sample in map(int, sys.argv[2:]):
        started = time.perf_counter()
        loader = ours.open_loader(dataset, sample // common.BATCH_ROWS)
        next(loader)
        seconds.append(time.perf_counter() - started)
        loader.close()  # type: ignore[attr-defined]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
