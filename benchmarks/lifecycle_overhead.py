"""What watching a run costs it: microseconds per optimizer step, and as a share of a step.

    python benchmarks/lifecycle_overhead.py [--rounds 9] [--step-ms 100] [--micro-batches 4] [--collectives 40]

Each part is measured alone, because all of them together drown in the noise of a step on a shared machine:

- marks: what loop and engine write into memory at every change of phase;
- beat: one heartbeat written by its thread, which holds the interpreter's lock; every 5 s, so a share of wall time. A
  rank that stands still also reads the flight recorder, but then there is no step to slow;
- recorder: torch's flight recorder at every collective, gloo of one process, in turns with processes without it;
- wait: taking a ready batch from the loader's queue with a wait that can be cut short, against a plain one;
- validation: fetching a batch in a thread of its own, per batch of a validation.

The sum of a step is marks + beat + recorder + wait, compared with ``--step-ms``.
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results_file import quartiles, write_result

ROOT = Path(__file__).resolve().parents[1]
BEAT_INTERVAL_S = 5.0

_COLLECTIVES = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=0, world_size=1)
values = torch.ones(16)
for _ in range(500):
    dist.all_reduce(values)
started = time.process_time()
for _ in range(3000):
    dist.all_reduce(values)
print((time.process_time() - started) / 3000 * 1e6)
os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the step that the sum is compared with")
    parser.add_argument("--micro-batches", type=int, default=4, help="in a step")
    parser.add_argument("--collectives", type=int, default=40, help="in a step")
    arguments = parser.parse_args()
    rounds, step_ms = arguments.rounds, arguments.step_ms
    marks = [_marks(arguments.micro_batches) for _ in range(rounds)]
    beats = _beats(rounds)
    waits = [_waits() for _ in range(rounds)]
    threads = [_threads() for _ in range(rounds)]
    recorder = [_recorder(kept=256) - _recorder(kept=0) for _ in range(rounds)]
    figures = {
        "marks_us_per_step": quartiles(marks),
        "beat_us": quartiles(beats),
        "recorder_us_per_collective": quartiles(recorder),
        "wait_us_per_step": quartiles(waits),
        "validation_us_per_batch": quartiles(threads),
    }
    sum_us = (
        statistics.median(marks)
        + statistics.median(beats) * step_ms / 1e3 / BEAT_INTERVAL_S
        + max(0.0, statistics.median(recorder)) * arguments.collectives
        + max(0.0, statistics.median(waits))
    )
    for name, values in figures.items():
        print(f"{name:<27} median {values['median']:>8.2f}   quartiles {values['low']:.2f} .. {values['high']:.2f}")
    share = sum_us / step_ms / 1e3
    print(f"a step of {step_ms:g} ms: {sum_us:.0f} us, {share:.3%}; goal below 1%")
    write_result(
        "lifecycle_overhead",
        {"arguments": vars(arguments), "figures": figures, "sum_us_per_step": sum_us, "share_of_step": share},
    )


def _marks(micro_batches: int) -> float:
    from pretrain.parallel.pulse import Pulse

    pulse = Pulse()

    def step() -> None:
        for phase in ("data", "all-reduce"):
            pulse.enter(phase)
        for _ in range(micro_batches):
            pulse.enter("forward")
            pulse.enter("backward")
        pulse.enter("optimizer")
        pulse.enter("all-reduce")
        pulse.completed(1)

    return _microseconds(step, 2000)


def _beats(rounds: int) -> list[float]:
    from launchers.run_dir import RunDir
    from pretrain.parallel.pulse import Pulse
    from pretrain.training.heartbeat import Heart, Place
    from pretrain.training.signals import StopRequest

    with tempfile.TemporaryDirectory() as folder:
        run, pulse = RunDir(Path(folder)), Pulse()
        run.heartbeats_path(1).mkdir(parents=True)
        heart = Heart(run, Place(0, 1, "node"), StopRequest(), pulse=pulse)

        def beat() -> None:
            pulse.tick()
            heart.beat()

        return [_microseconds(beat, 200) for _ in range(rounds)]


def _waits() -> float:
    """One get of a ready item with a time limit, less one without."""
    items: queue.Queue[int] = queue.Queue()

    def plain() -> None:
        items.put(1)
        items.get()

    def limited() -> None:
        items.put(1)
        items.get(timeout=0.2)

    return _microseconds(limited, 5000) - _microseconds(plain, 5000)


def _threads() -> float:
    from pretrain.training.signals import StopRequest

    stop = StopRequest()
    return _microseconds(lambda: stop.while_waiting(int), 300)


def _recorder(kept: int) -> float:
    """Processor time of one collective, in a process of its own because the recorder cannot be turned off."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"TORCH_FR_BUFFER_SIZE": str(kept), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _COLLECTIVES, str(port)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _microseconds(action: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - started) / count * 1e6


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
