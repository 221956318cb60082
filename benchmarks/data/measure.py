"""One contender in its own process, told over stdin when to run. Started by ``run.py``; see ``contender_process.py``.

    python measure.py convert MODULE VARIANT DATASET OUT
    python measure.py serve   MODULE VARIANT DATASET OUT WORKERS

``serve`` imports the contender, opens it, takes the first batch and reports the times; then for each line
``SECONDS`` it takes batches for so long and reports tokens and seconds. Answers are JSON lines on the first stdout;
whatever libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# Batches taken at the start of each turn and not counted: what had been fetched while it waited.
_SETTLE = 0.15


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[:0] = [str(_HERE), str(_HERE / "contenders")]
    verb, module, variant, dataset, out = sys.argv[1:6]
    started = time.perf_counter()
    contender = importlib.import_module(module)
    imported = time.perf_counter() - started
    if verb == "convert":
        started = time.perf_counter()
        contender.convert(Path(dataset), Path(out), variant)
        _answer(answers, {"seconds": time.perf_counter() - started})
    else:
        _serve(answers, contender, variant, Path(dataset), Path(out), int(sys.argv[6]), imported)
    answers.flush()
    if hasattr(contender, "clean_up"):
        contender.clean_up()
    # Libraries leave threads and processes behind that would keep this one alive.
    os._exit(0)


def _answer(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")


def _serve(answers: Any, contender: Any, variant: str, dataset: Path, out: Path, workers: int, imported: float) -> None:
    import torch

    torch.set_num_threads(1)
    baseline = resident_mb()
    started = time.perf_counter()
    iterator = contender.batches(dataset, out, variant, workers)
    first = next(iterator)
    first_batch = time.perf_counter() - started
    _answer(
        answers,
        {
            "import_s": imported,
            "first_batch_s": first_batch,
            "dtype": str(first.dtype).removeprefix("torch."),
            "shape": list(first.shape),
            "baseline_mb": baseline,
        },
    )
    for line in sys.stdin:
        take(iterator, min(_SETTLE, float(line)))
        answer = take(iterator, float(line))
        _answer(answers, answer | {"resident_mb": resident_mb()})


def take(iterator: Iterator[Any], seconds: float) -> dict[str, float]:
    """Take batches for ``seconds``; the clock stands still from the end of an epoch to the next one's first batch."""
    import torch
    from common import SEQUENCE_LENGTH

    narrow = {torch.uint16, torch.int16, torch.uint8}
    positions = rows = 0
    paused = 0.0
    processor = processor_seconds()
    now = started = time.perf_counter()
    while now - started - paused < seconds:
        batch = next(iterator)
        if batch is None:
            ended = time.perf_counter()
            batch = next(iterator)
            paused += time.perf_counter() - ended
        else:
            if batch.ndim == 2 and batch.dtype in narrow:
                batch = batch.to(torch.int32)
            positions += batch.shape[0] * min(batch.shape[1], SEQUENCE_LENGTH)
            rows += batch.shape[0]
        now = time.perf_counter()
    return {
        "positions": positions,
        "rows": rows,
        "seconds": now - started - paused,
        "paused_s": paused,
        "cpu_s": processor_seconds() - processor,
    }


def processor_seconds() -> float:
    """Processor time of this process, its threads and its worker processes so far."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def resident_mb() -> float:
    """Resident memory of this process and its children, in MB; shared pages count once for each."""
    import psutil

    process = psutil.Process()
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 1e6


if __name__ == "__main__":
    main()
